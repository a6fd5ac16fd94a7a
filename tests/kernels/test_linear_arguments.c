/* Linear layers refuse arguments that are wrong, each by itself in a call that is right otherwise. */
#include "tests/oracle/guard.h"
#include <criterion/criterion.h>
#include <math.h>

/* Arguments that are right, and what they point to. */
typedef struct {
  ks_ctx *ctx;
  ks_weight *foreign; /* of another context, or NULL */
  float *m;
  ks_segment segs[2];
  ks_lora l;
  ks_linear_args good;
} illegal;

static void illegal_reset(illegal *s) {
  s->l = (ks_lora){2, 1, s->m, s->m + 16, s->m + 32, s->m + 48};
  s->segs[0] = (ks_segment){0, 2, 0, 0};
  s->segs[1] = (ks_segment){2, 1, -1, 0};
}

#define BAD(op, change)                                                                                      \
  do {                                                                                                       \
    ks_linear_args a = s->good;                                                                              \
    illegal_reset(s);                                                                                        \
    cr_assert(ks_linear_##op(s->ctx, &a) == KS_OK, "%s", ks_error_message());                                \
    change;                                                                                                  \
    cr_assert(ks_linear_##op(s->ctx, &a) == KS_EINVAL, #op " accepts " #change);                             \
  } while (0)
static void illegal_forward(illegal *s) {
  ks_segment *segs = s->segs;
  ks_lora *l = &s->l;
  float *m = s->m;
  BAD(forward, a.n_rows = -1);
  BAD(forward, a.w = NULL);
  BAD(forward, if (s->foreign && strcmp(ks_ctx_isa_name(s->ctx), "generic") != 0) a.w = s->foreign;
      else a.w = NULL);
  BAD(forward, a.x = NULL);
  BAD(forward, a.y = NULL);
  BAD(forward, a.y = m + 66);
  BAD(forward, a.y = (float *)((char *)a.y + 2));
  BAD(forward, a.u = NULL);
  BAD(forward, a.u = a.y);
  BAD(forward, a.u_stride = 1);
  BAD(forward, a.y_is_f32 = true);
  BAD(forward, a.n_segments = -1);
  BAD(forward, a.segments = NULL);
  BAD(forward, segs[1].row_begin = 1);
  BAD(forward, segs[1].n_rows = 2);
  BAD(forward, segs[1].n_rows = INT64_MAX);
  BAD(forward, segs[0].row_begin = -1);
  BAD(forward, segs[0].adapter = 1);
  BAD(forward, segs[0].adapter = -2);
  BAD(forward, segs[1].adapter = 0);
  BAD(forward, l->rank = 257; a.u_stride = 300);
  BAD(forward, l->rank = -1);
  BAD(forward, l->a = NULL);
  BAD(forward, l->b_t = a.y);
  BAD(forward, a.dropout = 1);
  BAD(forward, a.dropout = -0.1f);
  BAD(forward, a.dropout = NAN);
  BAD(forward, a.n_rows = INT64_MAX / 2);
}

static void illegal_backward(illegal *s) {
  ks_lora *l = &s->l;
  float *m = s->m;
  BAD(backward, a.dy = NULL);
  BAD(backward, a.v = NULL);
  BAD(backward, a.dx = m + 160);
  BAD(backward, a.dx = m + 64);
  BAD(backward, l->grad_a = NULL);
  BAD(backward, l->grad_b_t = l->grad_a);
  BAD(backward, l->grad_a = m);
  BAD(backward, l->grad_a = m + 64);
}
#undef BAD

Test(linear_arguments, illegal) {
  illegal s = {.ctx = ks_test_any_ctx()};
  ks_ctx *other = NULL;
  ks_weight *w = NULL;
  float values[6 * 4] = {0};
  ks_guard memory = ks_guard_make(s.ctx, NULL, 512);
  float *m = s.m = memory.p;
  ks_weight_params wp = {.n_out = 6, .n_in = 4, .values = values};
  cr_assert(ks_weight_create(s.ctx, &wp, &w) == KS_OK);
  if (!ks_test_is_cuda()) {
    cr_assert(ks_ctx_create(&other, &(ks_ctx_params){.backend = "cpu", .n_threads = 1, .isa = "generic"}) ==
              KS_OK);
    cr_assert(ks_weight_create(other, &wp, &s.foreign) == KS_OK);
  }
  s.good = (ks_linear_args){.w = w,
                            .x = m + 64,
                            .y = m + 96,
                            .n_rows = 3,
                            .segments = s.segs,
                            .n_segments = 2,
                            .loras = &s.l,
                            .n_loras = 1,
                            .u = m + 128,
                            .u_stride = 2,
                            .dy = m + 160,
                            .dx = m + 192,
                            .v = m + 224};
  illegal_forward(&s);
  illegal_backward(&s);
  cr_assert(ks_linear_forward(NULL, &s.good) == KS_EINVAL && ks_linear_forward(s.ctx, NULL) == KS_EINVAL);
  ks_guard_free(&memory);
  ks_weight_destroy(s.ctx, w);
  if (other) {
    ks_weight_destroy(other, s.foreign);
    ks_ctx_destroy(other);
  }
  ks_ctx_destroy(s.ctx);
}
