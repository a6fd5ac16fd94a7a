/* The user, simulated: gives the preferred response to a kept question, within a budget.
 *
 * asked = answered + refused and asked <= budget hold after every call (asserted). A question that falls to the budget counts in over_budget
 * once and is never put. What happens to a kept set that has no answer is the trainer's choice (ks_kept.annotated). */
#ifndef KS_ANNOTATE_H
#define KS_ANNOTATE_H

#include "core/data/data.h"
#include "core/select/select.h"

typedef enum { KS_ASK_ADMISSION = 0, KS_ASK_TRIGGER } ks_ask;

typedef struct {
  ks_ask ask;       /* on admission to the buffer, or at the trigger for what survived */
  int64_t budget;   /* questions that may be put to the user over the whole stream; -1: no bound */
  double refusal;   /* probability that the user does not answer; the question counts */
  double noise;     /* probability that the user answers with the preferred response of another set of the same dataset: one that may arrive
                       (after the split: of its stream, never a held-out one); where there is no other set, the answer is the right one */
  uint64_t seed;
} ks_annotator_params;

typedef struct {
  int64_t asked, answered, refused; /* questions put to the user */
  int64_t over_budget;              /* questions that were not */
  int64_t noisy, cut;               /* answers of another set; answers that did not fit their bin */
} ks_annotator_counts;

typedef struct ks_annotator ks_annotator;
/* data is borrowed and must outlive the annotator. */
ks_status ks_annotator_create(const ks_annotator_params *params, const ks_dataset *data, ks_annotator **out);
void ks_annotator_destroy(ks_annotator *a);
/* Call after every offer that kept a set; asks at once under KS_ASK_ADMISSION. A draw depends on the arrival's index alone. */
ks_status ks_annotator_admitted(ks_annotator *a, ks_buffer *b, int64_t slot);
/* Call at a trigger, before synthesis: asks, in bin order, about kept sets that never had their turn (both modes). */
ks_status ks_annotator_trigger(ks_annotator *a, ks_buffer *b);
ks_annotator_counts ks_annotator_get_counts(const ks_annotator *a);
ks_status ks_annotator_snapshot(const ks_annotator *a, ks_text *out);
ks_status ks_annotator_restore(ks_annotator *a, const void *bytes, size_t n);

#endif
