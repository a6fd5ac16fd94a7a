#include "tests/oracle/oracle_sample.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
  float logit;
  int64_t id;
} entry;

static int by_logit_then_id(const void *a, const void *b) {
  const entry *x = a, *y = b;
  if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
  return x->id < y->id ? -1 : 1;
}

void oracle_sample(const float *logits, int64_t n, double temperature, int64_t top_k, double top_p,
                   double *p) {
  entry *e = malloc((size_t)n * sizeof *e);
  if (!e) abort();
  double total = 0, sum = 0;
  int64_t kept = top_k > 0 && top_k < n ? top_k : n, last;
  for (int64_t i = 0; i < n; i++) {
    e[i] = (entry){logits[i], i};
    p[i] = 0;
  }
  qsort(e, (size_t)n, sizeof *e, by_logit_then_id);
  for (int64_t i = 0; i < kept; i++)
    total += exp(((double)e[i].logit - (double)e[0].logit) / temperature);
  for (last = 0; last < kept && (last == 0 || sum < top_p * total); last++) {
    p[e[last].id] = exp(((double)e[last].logit - (double)e[0].logit) / temperature);
    sum += p[e[last].id];
  }
  for (int64_t i = 0; i < last; i++)
    p[e[i].id] /= sum;
  free(e);
}

double oracle_chi_square(const int64_t *counts, const double *p, int64_t n, int64_t draws, int64_t *freedom) {
  double x = 0;
  *freedom = -1;
  for (int64_t i = 0; i < n; i++) {
    if (p[i] == 0 && counts[i] > 0) return INFINITY;
    if (p[i] == 0) continue;
    double expected = p[i] * (double)draws, off = (double)counts[i] - expected;
    x += off * off / expected;
    ++*freedom;
  }
  return x;
}

double oracle_chi_square_limit(int64_t freedom) {
  const double k = (double)freedom, z = 4.753424, a = 2 / (9 * k), root = 1 - a + z * sqrt(a);
  return k * root * root * root;
}
