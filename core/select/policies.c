#include "core/select/select.h"

/* One line a policy; each lives in policies/<name>.c. */
#define KS_POLICY_MAP(X)                                                                                     \
  X(none)                                                                                                    \
  X(random)                                                                                                  \
  X(reservoir)                                                                                               \
  X(fifo)                                                                                                    \
  X(k_center)                                                                                                \
  X(sdss)                                                                                                    \
  X(all)

#define X(name) extern const ks_policy ks_policy_##name;
KS_POLICY_MAP(X)
#undef X

const ks_policy *const ks_policies[] = {
#define X(name) &ks_policy_##name,
    KS_POLICY_MAP(X)
#undef X
        NULL};

const ks_policy *ks_policy_find(const char *name) {
  for (int64_t i = 0; ks_policies[i]; i++)
    if (strcmp(ks_policies[i]->name, name) == 0) return ks_policies[i];
  return NULL;
}
