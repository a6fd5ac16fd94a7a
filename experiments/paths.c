#include "experiments/paths.h"

#include "experiments/config.h"
#include <glob.h>
#include <string.h>

ks_status ks_model_path_default(const char *given, char **out) {
  if (given) return ks_strdup(given, out);
  return ks_path_join(ks_project_root(), "datasets/base", out);
}

/* The only file that matches pattern in folder, or nothing: *out stays NULL. */
static ks_status find_only(const char *folder, const char *pattern, char **out) {
  char *path;
  glob_t found;
  KS_TRY(ks_path_join(folder, pattern, &path));
  int r = glob(path, 0, NULL, &found);
  free(path);
  if (r == GLOB_NOSPACE) return KS_FAIL(KS_ENOMEM, "no memory to look into %s", folder);
  if (r != 0) return KS_OK;
  ks_status status = found.gl_pathc == 1 ? ks_strdup(found.gl_pathv[0], out) : KS_OK;
  globfree(&found);
  return status;
}

ks_status ks_tokenizer_path_find(const char *given, const char *model_path, char **out) {
  static const char *const patterns[] = {"tokenizer.bin", "tokenizer.model", "tokenizer.json", "tok*.bin",
                                         "tok*.model"};
  if (given && *given) return ks_strdup(given, out);
  if (ks_dir_exists(model_path)) return ks_strdup(model_path, out);
  const char *slash = strrchr(model_path, '/');
  char *folder = NULL;
  KS_TRY(slash ? ks_strndup(model_path, (size_t)(slash - model_path) + 1, &folder)
               : ks_strdup("./", &folder));
  *out = NULL;
  ks_status status = KS_OK;
  for (size_t i = 0; status == KS_OK && !*out && i < sizeof patterns / sizeof *patterns; i++)
    status = find_only(folder, patterns[i], out);
  free(folder);
  if (status == KS_OK && !*out)
    return KS_FAIL(KS_ECONFIG,
                   "%s: no tokenizer beside it (tokenizer.bin, tokenizer.model, tokenizer.json); name it "
                   "with --tokenizer, or model.tokenizer in a configuration",
                   model_path);
  return status;
}
