#include "experiments/cli.h"
#include "experiments/config.h"

#include <stdio.h>

static const ks_command command = {"explain",
                                   "[KEY|GROUP]",
                                   "What configuration keys there are: type, range, unit, default, meaning.",
                                   NULL,
                                   0,
                                   -1,
                                   "Example: keepsake explain train.learning_rate"};

int ks_verb_explain(int argc, char **argv) {
  ks_args args;
  if (!ks_args_parse(&command, argc, argv, &args)) return args.exit_code;
  ks_text text = {0};
  ks_status status = args.n_operands == 0 ? ks_config_explain(NULL, &text) : KS_OK;
  for (int64_t i = 0; status == KS_OK && i < args.n_operands; i++)
    status = ks_config_explain(args.operands[i], &text);
  if (text.data && status == KS_OK) fputs(text.data, stdout);
  ks_text_free(&text);
  ks_args_free(&args);
  return ks_cli_finish(status);
}
