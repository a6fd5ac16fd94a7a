/* The operations of ops.h: every argument is checked here, then the context's backend does the work. */
#include "kernels/backend.h"
#include <math.h>

/* ---------------------------------------------------------------- spans */

/* Two spans that share an alias bit may be the same memory. */
enum { IN = 0, OUT = 1, MAY_BE_NULL = 2, ALIAS_A = 4, ALIAS_B = 8, ALIAS = ALIAS_A | ALIAS_B };

/* An array argument: n_rows x n_cols elements of `size` bytes. */
typedef struct {
  const char *name;
  const void *p;
  int64_t n_rows, n_cols;
  size_t size;
  int flags;
} span;
#define F32(name, ptr, rows, cols, flags)                                                                    \
  { name, ptr, rows, cols, sizeof(float), flags }
/* Of activations; needs `ctx`. */
#define ACT(name, ptr, rows, cols, flags)                                                                    \
  { name, ptr, rows, cols, ks_ctx_act_size(ctx), flags }
#define ARRAY(name, ptr, n, flags)                                                                           \
  { name, ptr, n, 1, sizeof *(ptr), flags }
#define N_SPANS(spans) ((int)(sizeof(spans) / sizeof(spans)[0]))

static ks_status span_bytes(const char *op, const span *s, size_t *bytes) {
  size_t n;
  if (s->n_rows < 0 || s->n_cols < 0)
    return KS_FAIL(KS_EINVAL, "%s: %s is %lld x %lld; sizes are 0 or more", op, s->name, (long long)s->n_rows,
                   (long long)s->n_cols);
  if (!ks_mul_size((size_t)s->n_rows, (size_t)s->n_cols, &n) || !ks_mul_size(n, s->size, bytes) ||
      *bytes > PTRDIFF_MAX)
    return KS_FAIL(KS_EINVAL, "%s: %s of %lld x %lld elements does not fit an address space", op, s->name,
                   (long long)s->n_rows, (long long)s->n_cols);
  return KS_OK;
}

static bool overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
  uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
  return a && b && a_bytes && b_bytes && x < y + b_bytes && y < x + a_bytes;
}

/* Sizes, NULL, alignment, and that no output overlaps another argument. */
static ks_status check_spans(const char *op, const span *spans, int n) {
  size_t bytes[16];
  KS_ASSERT(n <= 16);
  for (int i = 0; i < n; i++) {
    const span *s = &spans[i];
    KS_TRY(span_bytes(op, s, &bytes[i]));
    if (!s->p && bytes[i] && !(s->flags & MAY_BE_NULL))
      return KS_FAIL(KS_EINVAL, "%s: %s is NULL", op, s->name);
    if ((uintptr_t)s->p % (s->size < 8 ? s->size : 8) != 0) /* structures: of at most 8-byte fields */
      return KS_FAIL(KS_EINVAL, "%s: %s is not aligned to its %zu-byte elements", op, s->name, s->size);
    for (int j = 0; j < i; j++) {
      const span *t = &spans[j];
      if (!((s->flags | t->flags) & OUT) || !overlap(s->p, bytes[i], t->p, bytes[j])) continue;
      if ((s->flags & t->flags & ALIAS) && s->p == t->p && bytes[i] == bytes[j]) continue;
      return KS_FAIL(KS_EINVAL, "%s: %s overlaps %s", op, s->name, t->name);
    }
  }
  return KS_OK;
}

static ks_status check_ctx(const char *op, const ks_ctx *ctx, const void *args, bool has_operation) {
  if (!ctx || !args) return KS_FAIL(KS_EINVAL, "%s: NULL argument", op);
  if (!has_operation)
    return KS_FAIL(KS_EUNSUPPORTED, "%s: backend '%s' does not have this operation", op, ctx->backend->name);
  return KS_OK;
}
#define CHECK_CTX(op) check_ctx(#op, ctx, a, ctx && ctx->backend->op)

static ks_status check_weight(const char *op, const ks_ctx *ctx, const ks_weight *w) {
  if (!w) return KS_FAIL(KS_EINVAL, "%s: w is NULL", op);
  if (w->backend != ctx->backend)
    return KS_FAIL(KS_EINVAL, "%s: the weight was created by a context of another backend or instruction set",
                   op);
  return KS_OK;
}

static ks_status check_index(const char *op, const char *name, int64_t i, int64_t value, int64_t n) {
  if (value >= 0 && value < n) return KS_OK;
  return KS_FAIL(KS_EINVAL, "%s: %s[%lld] is %lld; give 0 to %lld", op, name, (long long)i, (long long)value,
                 (long long)n - 1);
}

static ks_status check_indices32(const char *op, const char *name, const int32_t *index, int64_t n_rows,
                                 int64_t n) {
  for (int64_t i = 0; i < n_rows; i++)
    KS_TRY(check_index(op, name, i, index[i], n));
  return KS_OK;
}

/* ---------------------------------------------------------------- embedding, rows */

ks_status ks_embed_forward(ks_ctx *ctx, const ks_embed_args *a) {
  KS_TRY(CHECK_CTX(embed_forward));
  KS_TRY(check_weight("embed_forward", ctx, a->w));
  const span spans[] = {ARRAY("tokens", a->tokens, a->n_rows, a->drawn ? IN | MAY_BE_NULL : IN),
                        ARRAY("drawn", a->drawn, a->n_rows, IN | MAY_BE_NULL),
                        ACT("y", a->y, a->n_rows, a->w->n_in, OUT)};
  KS_TRY(check_spans("embed_forward", spans, N_SPANS(spans)));
  if (!a->drawn) KS_TRY(check_indices32("embed_forward", "tokens", a->tokens, a->n_rows, a->w->n_out));
  if (a->drawn && a->n_rows && a->w->n_out == 0)
    return KS_FAIL(KS_EINVAL, "embed_forward: w has no rows to read");
  return a->n_rows && a->w->n_in ? ctx->backend->embed_forward(ctx, a) : KS_OK;
}

ks_status ks_rows_gather(ks_ctx *ctx, const ks_rows_args *a) {
  KS_TRY(CHECK_CTX(rows_gather));
  const span spans[] = {ACT("x", a->x, a->n_x_rows, a->n_cols, IN), ARRAY("index", a->index, a->n_rows, IN),
                        ACT("y", a->y, a->n_rows, a->n_cols, OUT)};
  KS_TRY(check_spans("rows_gather", spans, N_SPANS(spans)));
  for (int64_t i = 0; i < a->n_rows; i++)
    KS_TRY(check_index("rows_gather", "index", i, a->index[i], a->n_x_rows));
  return a->n_rows && a->n_cols ? ctx->backend->rows_gather(ctx, a) : KS_OK;
}

/* Rising indices, the usual case, need no memory to be seen free of repeats. */
static ks_status check_no_repeats(const int64_t *index, int64_t n, int64_t n_values) {
  bool rising = true;
  for (int64_t i = 1; i < n && rising; i++)
    rising = index[i - 1] < index[i];
  if (rising) return KS_OK;
  unsigned char *seen = NULL;
  KS_TRY(ks_alloc_array(&seen, (size_t)n_values, 1, "rows_scatter: marks"));
  ks_status status = KS_OK;
  for (int64_t i = 0; i < n && status == KS_OK; i++) {
    if (seen[index[i]])
      status =
          KS_FAIL(KS_EINVAL, "rows_scatter: index[%lld] = %lld repeats", (long long)i, (long long)index[i]);
    seen[index[i]] = 1;
  }
  free(seen);
  return status;
}

static ks_status check_rows_scatter(ks_ctx *ctx, const ks_rows_args *a, bool known_index) {
  KS_TRY(CHECK_CTX(rows_scatter));
  const span spans[] = {ACT("x", a->x, a->n_rows, a->n_cols, IN), ARRAY("index", a->index, a->n_rows, IN),
                        ACT("y", a->y, a->n_x_rows, a->n_cols, OUT)};
  KS_TRY(check_spans("rows_scatter", spans, N_SPANS(spans)));
  if (known_index) return KS_OK;
  for (int64_t i = 0; i < a->n_rows; i++)
    KS_TRY(check_index("rows_scatter", "index", i, a->index[i], a->n_x_rows));
  return check_no_repeats(a->index, a->n_rows, a->n_x_rows);
}

ks_status ks_rows_scatter(ks_ctx *ctx, const ks_rows_args *a) {
  KS_TRY(check_rows_scatter(ctx, a, false));
  return a->n_rows && a->n_cols ? ctx->backend->rows_scatter(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- linear */

enum { MAX_RANK = 256, MAX_LORAS = 1 << 20 };

/* largest: of the adapters before; rising ones, the usual case, need not be looked for. */
static ks_status check_segment(const char *op, const ks_linear_args *a, int64_t s, int64_t previous_end,
                               int32_t largest) {
  const ks_segment *seg = &a->segments[s];
  if (seg->n_rows < 0 || seg->row_begin < previous_end || seg->row_begin > a->n_rows ||
      seg->n_rows > a->n_rows - seg->row_begin)
    return KS_FAIL(
        KS_EINVAL,
        "%s: segment %lld has rows %lld + %lld; segments are sorted, do not overlap and lie in %lld rows", op,
        (long long)s, (long long)seg->row_begin, (long long)seg->n_rows, (long long)a->n_rows);
  if (seg->adapter < -1 || seg->adapter >= a->n_loras)
    return KS_FAIL(KS_EINVAL, "%s: segment %lld has adapter %d; give -1 (none) to %lld", op, (long long)s,
                   (int)seg->adapter, (long long)a->n_loras - 1);
  for (int64_t t = 0; seg->adapter >= 0 && seg->adapter <= largest && t < s; t++)
    if (a->segments[t].adapter == seg->adapter)
      return KS_FAIL(KS_EINVAL, "%s: segments %lld and %lld both have adapter %d", op, (long long)t,
                     (long long)s, (int)seg->adapter);
  return KS_OK;
}

/* One adapter's arrays, beside those of the operation. */
static ks_status check_lora(const char *op, const ks_linear_args *a, const ks_lora *l, bool backward,
                            const span *others, int n_others) {
  span spans[16];
  int n = 0;
  if (l->rank < 0 || l->rank > MAX_RANK)
    return KS_FAIL(KS_EINVAL, "%s: rank %d; give 0 to %d", op, (int)l->rank, MAX_RANK);
  if (l->rank == 0) return KS_OK;
  if (l->rank > a->u_stride)
    return KS_FAIL(KS_EINVAL, "%s: u_stride %lld is less than rank %d", op, (long long)a->u_stride,
                   (int)l->rank);
  for (; n < n_others; n++)
    spans[n] = others[n];
  spans[n++] = (span)F32("lora.a", l->a, l->rank, a->w->n_in, IN);
  spans[n++] = (span)F32("lora.b_t", l->b_t, l->rank, a->w->n_out, IN);
  if (backward) {
    spans[n++] = (span)F32("lora.grad_a", l->grad_a, l->rank, a->w->n_in, OUT);
    spans[n++] = (span)F32("lora.grad_b_t", l->grad_b_t, l->rank, a->w->n_out, OUT);
  }
  return check_spans(op, spans, n);
}

static ks_status check_segments(const char *op, const ks_linear_args *a, bool backward, const span *others,
                                int n_others) {
  if (a->n_segments < 0 || a->n_loras < 0 || a->n_loras > MAX_LORAS || (a->n_segments && !a->segments) ||
      (a->n_loras && !a->loras))
    return KS_FAIL(KS_EINVAL, "%s: segments or loras are NULL or their counts out of range", op);
  if (!(a->dropout >= 0 && a->dropout < 1))
    return KS_FAIL(KS_EINVAL, "%s: dropout is %g; give 0 or more and less than 1", op, (double)a->dropout);
  int64_t end = 0;
  int32_t largest = -1;
  bool any = false;
  for (int64_t s = 0; s < a->n_segments; s++) {
    KS_TRY(check_segment(op, a, s, end, largest));
    end = a->segments[s].row_begin + a->segments[s].n_rows;
    int32_t adapter = a->segments[s].adapter;
    if (adapter < 0) continue;
    if (adapter > largest) largest = adapter;
    KS_TRY(check_lora(op, a, &a->loras[adapter], backward, others, n_others));
    any |= a->loras[adapter].rank > 0;
  }
  if (any && a->n_rows > 0 && (!a->u || (backward && !a->v)))
    return KS_FAIL(KS_EINVAL, "%s: u%s is NULL though a segment has an adapter", op, backward ? " or v" : "");
  return KS_OK;
}

static ks_status check_linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  const char *op = "linear_forward";
  KS_TRY(CHECK_CTX(linear_forward));
  KS_TRY(check_weight(op, ctx, a->w));
  const size_t y_size = a->y_is_f32 ? sizeof(float) : ks_ctx_act_size(ctx);
  const span spans[] = {ACT("x", a->x, a->n_rows, a->w->n_in, IN),
                        {"y", a->y, a->n_rows, a->w->n_out, y_size, OUT | ALIAS_A},
                        ACT("u", a->u, a->n_rows, a->u ? a->u_stride : 0, OUT),
                        ACT("residual", a->residual, a->n_rows, a->w->n_out, IN | ALIAS_A | MAY_BE_NULL)};
  KS_TRY(check_spans(op, spans, N_SPANS(spans)));
  KS_TRY(check_segments(op, a, false, spans, N_SPANS(spans)));
  if (a->y_is_f32 && (a->residual || a->n_segments > 0))
    return KS_FAIL(KS_EINVAL, "%s: y_is_f32 goes with neither residual nor segments", op);
  return KS_OK;
}

ks_status ks_linear_forward(ks_ctx *ctx, const ks_linear_args *a) {
  KS_TRY(check_linear_forward(ctx, a));
  return a->n_rows && a->w->n_out ? ctx->backend->linear_forward(ctx, a) : KS_OK;
}

static ks_status check_linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  const char *op = "linear_backward";
  KS_TRY(CHECK_CTX(linear_backward));
  KS_TRY(check_weight(op, ctx, a->w));
  const span spans[] = {ACT("x", a->x, a->n_rows, a->w->n_in, IN),
                        ACT("dy", a->dy, a->n_rows, a->w->n_out, IN),
                        ACT("u", a->u, a->n_rows, a->u ? a->u_stride : 0, IN),
                        ACT("v", a->v, a->n_rows, a->v ? a->u_stride : 0, OUT),
                        ACT("dx", a->dx, a->n_rows, a->w->n_in, OUT | MAY_BE_NULL)};
  KS_TRY(check_spans(op, spans, N_SPANS(spans)));
  return check_segments(op, a, true, spans, N_SPANS(spans));
}

ks_status ks_linear_backward(ks_ctx *ctx, const ks_linear_args *a) {
  KS_TRY(check_linear_backward(ctx, a));
  return a->n_rows && a->w->n_in ? ctx->backend->linear_backward(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- norm, rotary, SwiGLU */

static ks_status check_eps(const char *op, double eps) {
  if (eps >= 0 && isfinite(eps)) return KS_OK;
  return KS_FAIL(KS_EINVAL, "%s: eps is %g; give a finite number of 0 or more", op, eps);
}

static ks_status check_rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  KS_TRY(CHECK_CTX(rmsnorm_forward));
  const span spans[] = {ACT("x", a->x, a->n_rows, a->n_cols, IN | ALIAS_A), F32("w", a->w, a->n_cols, 1, IN),
                        ACT("y", a->y, a->n_rows, a->n_cols, OUT | ALIAS_A),
                        F32("rstd", a->rstd, a->n_rows, 1, OUT | MAY_BE_NULL)};
  KS_TRY(check_spans("rmsnorm_forward", spans, N_SPANS(spans)));
  return check_eps("rmsnorm_forward", (double)a->eps);
}

ks_status ks_rmsnorm_forward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  KS_TRY(check_rmsnorm_forward(ctx, a));
  return a->n_rows && a->n_cols ? ctx->backend->rmsnorm_forward(ctx, a) : KS_OK;
}

ks_status ks_rmsnorm_backward(ks_ctx *ctx, const ks_rmsnorm_args *a) {
  KS_TRY(CHECK_CTX(rmsnorm_backward));
  const span spans[] = {ACT("x", a->x, a->n_rows, a->n_cols, IN), F32("w", a->w, a->n_cols, 1, IN),
                        F32("rstd", a->rstd, a->n_rows, 1, IN),
                        ACT("dy", a->dy, a->n_rows, a->n_cols, IN | ALIAS_A),
                        ACT("dx", a->dx, a->n_rows, a->n_cols, OUT | (a->accumulate_dx ? 0 : ALIAS_A))};
  KS_TRY(check_spans("rmsnorm_backward", spans, N_SPANS(spans)));
  return a->n_rows && a->n_cols ? ctx->backend->rmsnorm_backward(ctx, a) : KS_OK;
}

static ks_status check_rope(ks_ctx *ctx, const ks_rope_args *a) {
  KS_TRY(CHECK_CTX(rope));
  int64_t n_cols;
  if (a->n_heads < 0 || a->head_dim < 0 || a->head_dim % 2 != 0 ||
      !ks_mul_i64(a->n_heads, a->head_dim, &n_cols))
    return KS_FAIL(KS_EINVAL, "rope: %lld heads of %lld; the head size must be even", (long long)a->n_heads,
                   (long long)a->head_dim);
  const span spans[] = {ACT("x", a->x, a->n_rows, n_cols, OUT),
                        ARRAY("positions", a->positions, a->n_rows, IN),
                        ARRAY("inv_freq", a->inv_freq, a->head_dim / 2, IN)};
  KS_TRY(check_spans("rope", spans, N_SPANS(spans)));
  for (int64_t i = 0; i < a->n_rows; i++)
    if (a->positions[i] < 0)
      return KS_FAIL(KS_EINVAL, "rope: positions[%lld] is %d; give 0 or more", (long long)i,
                     (int)a->positions[i]);
  return KS_OK;
}

ks_status ks_rope(ks_ctx *ctx, const ks_rope_args *a) {
  KS_TRY(check_rope(ctx, a));
  return a->n_rows && a->n_heads && a->head_dim ? ctx->backend->rope(ctx, a) : KS_OK;
}

static ks_status check_swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  KS_TRY(CHECK_CTX(swiglu_forward));
  const span spans[] = {ACT("gate", a->gate, a->n, 1, IN | ALIAS_A), ACT("up", a->up, a->n, 1, IN | ALIAS_B),
                        ACT("h", a->h, a->n, 1, OUT | ALIAS)};
  return check_spans("swiglu_forward", spans, N_SPANS(spans));
}

ks_status ks_swiglu_forward(ks_ctx *ctx, const ks_swiglu_args *a) {
  KS_TRY(check_swiglu_forward(ctx, a));
  return a->n ? ctx->backend->swiglu_forward(ctx, a) : KS_OK;
}

ks_status ks_swiglu_backward(ks_ctx *ctx, const ks_swiglu_args *a) {
  KS_TRY(CHECK_CTX(swiglu_backward));
  const span spans[] = {ACT("gate", a->gate, a->n, 1, IN | ALIAS_A), ACT("up", a->up, a->n, 1, IN | ALIAS_B),
                        ACT("dh", a->dh, a->n, 1, IN), ACT("dgate", a->dgate, a->n, 1, OUT | ALIAS_A),
                        ACT("dup", a->dup, a->n, 1, OUT | ALIAS_B)};
  KS_TRY(check_spans("swiglu_backward", spans, N_SPANS(spans)));
  return a->n ? ctx->backend->swiglu_backward(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- several in one call */

static bool same_input(const ks_linear_args *a, const ks_linear_args *b) {
  if (a->x != b->x || a->n_rows != b->n_rows || a->w->n_in != b->w->n_in || a->generation != b->generation)
    return false;
  if (a->n_segments == 0 || b->n_segments == 0) return true;
  if (a->n_segments != b->n_segments || a->dropout > b->dropout || a->dropout < b->dropout) return false;
  for (int64_t s = 0; s < a->n_segments; s++) {
    const ks_segment *x = &a->segments[s], *y = &b->segments[s];
    if (x->row_begin != y->row_begin || x->n_rows != y->n_rows || x->adapter != y->adapter ||
        x->dropout_key != y->dropout_key)
      return false;
  }
  return true;
}

static bool same_angles(const ks_rope_args *a, const ks_rope_args *b) {
  return a->n_rows == b->n_rows && a->head_dim == b->head_dim && a->inverse == b->inverse &&
         a->positions == b->positions && a->inv_freq == b->inv_freq;
}

/* *empty: one of the arrays has nothing to do. */
static ks_status check_rope_store(const char *op, ks_ctx *ctx, const ks_rope_store_args *a, bool *empty) {
  *empty = false;
  if (a->n_rope < 0 || a->n_rope > 2 || a->n_store < 0 || a->n_store > 2 || (a->n_rope && !a->rope) ||
      (a->n_store && !a->store))
    return KS_FAIL(KS_EINVAL, "%s: %lld arrays to rotate, %lld to store; give 0 to 2 of each", op,
                   (long long)a->n_rope, (long long)a->n_store);
  for (int64_t i = 0; i < a->n_rope; i++) {
    KS_TRY(check_rope(ctx, &a->rope[i]));
    if (!same_angles(&a->rope[0], &a->rope[i]))
      return KS_FAIL(KS_EINVAL, "%s: the arrays differ in rows, positions or head size", op);
    *empty |= a->rope[i].n_rows == 0 || a->rope[i].n_heads == 0 || a->rope[i].head_dim == 0;
  }
  for (int64_t i = 0; i < a->n_store; i++) {
    const ks_rows_args *store = &a->store[i];
    if (store->index != a->store[0].index || store->n_rows != a->store[0].n_rows)
      return KS_FAIL(KS_EINVAL, "%s: the stored arrays differ in their index", op);
    KS_TRY(check_rows_scatter(ctx, store, i > 0 && store->n_x_rows == a->store[0].n_x_rows));
    *empty |= a->store[i].n_rows == 0 || a->store[i].n_cols == 0;
  }
  return KS_OK;
}

ks_status ks_rope_store(ks_ctx *ctx, const ks_rope_store_args *a) {
  const char *op = "rope_store";
  bool empty;
  KS_TRY(check_ctx(op, ctx, a, true));
  KS_TRY(check_rope_store(op, ctx, a, &empty));
  if (ctx->backend->rope_store && !empty) return ctx->backend->rope_store(ctx, a);
  for (int64_t i = 0; i < a->n_rope; i++)
    KS_TRY(ks_rope(ctx, &a->rope[i]));
  for (int64_t i = 0; i < a->n_store; i++)
    KS_TRY(ks_rows_scatter(ctx, &a->store[i]));
  return KS_OK;
}

/* Parts beside each other; *empty: one of them has nothing to do. */
static ks_status check_parts(const char *op, ks_ctx *ctx, const ks_linears_args *a, bool backward,
                             bool *empty) {
  span spans[3 * KS_LINEARS_MAX + 1];
  int n = 0;
  const ks_linear_args *with_segments = a->parts;
  *empty = false;
  if (a->n_parts < 1 || a->n_parts > KS_LINEARS_MAX || !a->parts)
    return KS_FAIL(KS_EINVAL, "%s: %lld parts; give 1 to %d", op, (long long)a->n_parts, KS_LINEARS_MAX);
  for (int64_t i = 0; i < a->n_parts; i++) {
    const ks_linear_args *p = &a->parts[i];
    KS_TRY(backward ? check_linear_backward(ctx, p) : check_linear_forward(ctx, p));
    if (p->n_segments > 0 && with_segments->n_segments == 0) with_segments = p;
    if (!same_input(with_segments, p))
      return KS_FAIL(KS_EINVAL,
                     "%s: part %lld has another x, segments, dropout or generation than those before it", op,
                     (long long)i);
    if (backward && i > 0 && p->dx && p->dx == a->parts[0].dx && !p->accumulate_dx)
      return KS_FAIL(KS_EINVAL, "%s: part %lld would overwrite the dx of part 0; set accumulate_dx", op,
                     (long long)i);
    spans[n++] = (span){"y (or v) of a part",
                        backward ? p->v : p->y,
                        p->n_rows,
                        backward ? (p->v ? p->u_stride : 0) : p->w->n_out,
                        p->y_is_f32 ? sizeof(float) : ks_ctx_act_size(ctx),
                        OUT};
    spans[n++] = (span)ACT("u of a part", p->n_segments ? p->u : NULL, p->n_rows,
                           p->n_segments && p->u ? p->u_stride : 0, backward ? IN : OUT);
    if (!backward && p->residual != p->y)
      spans[n++] = (span)ACT("residual of a part", p->residual, p->n_rows, p->w->n_out, IN | MAY_BE_NULL);
    *empty |= p->n_rows == 0 || p->w->n_in == 0 || p->w->n_out == 0;
  }
  if (a->norm) spans[n++] = (span)ACT("x of the norm", a->norm->x, a->norm->n_rows, a->norm->n_cols, IN);
  return check_spans(op, spans, n);
}

static const ks_linear_args *part_of(const ks_linears_args *a, const void *y) {
  for (int64_t i = 0; i < a->n_parts; i++)
    if (a->parts[i].y == y) return &a->parts[i];
  return NULL;
}

/* Whether what is rotated and stored is what the parts make. */
static ks_status check_rope_of_parts(const char *op, ks_ctx *ctx, const ks_linears_args *a, bool *empty) {
  const ks_rope_store_args *rope = a->rope;
  bool ok = !a->swiglu;
  KS_TRY(check_rope_store(op, ctx, rope, empty));
  for (int64_t i = 0; i < rope->n_rope; i++) {
    const ks_linear_args *p = part_of(a, rope->rope[i].x);
    ok = ok && p && !p->y_is_f32 && rope->rope[i].n_rows == p->n_rows &&
         rope->rope[i].n_heads * rope->rope[i].head_dim == p->w->n_out;
  }
  for (int64_t i = 0; i < rope->n_store; i++) {
    const ks_linear_args *p = part_of(a, rope->store[i].x);
    ok =
        ok && p && !p->y_is_f32 && rope->store[i].n_rows == p->n_rows && rope->store[i].n_cols == p->w->n_out;
  }
  return ok ? KS_OK : KS_FAIL(KS_EINVAL, "%s: rope needs the y of parts, whole, and no SwiGLU", op);
}

/* That what SwiGLU and rope make leaves alone what the parts read: all of it may be one launch. */
static ks_status check_results(const char *op, ks_ctx *ctx, const ks_linears_args *a) {
  const ks_linear_args *first = &a->parts[0];
  span spans[5] = {ACT("x", first->x, first->n_rows, first->w->n_in, IN)};
  int n = 1;
  if (a->norm) spans[n++] = (span)ACT("x of the norm", a->norm->x, first->n_rows, first->w->n_in, IN);
  if (a->swiglu) spans[n++] = (span)ACT("h", a->swiglu->h, a->swiglu->n, 1, OUT);
  for (int64_t i = 0; a->rope && i < a->rope->n_store; i++) {
    const ks_rows_args *store = &a->rope->store[i];
    spans[n++] = (span)ACT("y of a stored array", store->y, store->n_x_rows, store->n_cols, OUT);
  }
  return check_spans(op, spans, n);
}

ks_status ks_linears_forward(ks_ctx *ctx, const ks_linears_args *a) {
  const char *op = "linears_forward";
  bool empty, no_rope = false;
  KS_TRY(check_ctx(op, ctx, a, true));
  KS_TRY(check_parts(op, ctx, a, false, &empty));
  if (a->norm) {
    KS_TRY(check_rmsnorm_forward(ctx, a->norm));
    if (a->norm->y != a->parts[0].x || a->norm->n_rows != a->parts[0].n_rows ||
        a->norm->n_cols != a->parts[0].w->n_in)
      return KS_FAIL(KS_EINVAL, "%s: the norm does not make x", op);
  }
  if (a->swiglu) {
    const ks_linear_args *gate = &a->parts[0], *up = &a->parts[1];
    KS_TRY(check_swiglu_forward(ctx, a->swiglu));
    if (a->n_parts != 2 || a->swiglu->gate != gate->y || a->swiglu->up != up->y ||
        gate->w->n_out != up->w->n_out || a->swiglu->n != gate->n_rows * gate->w->n_out)
      return KS_FAIL(KS_EINVAL, "%s: SwiGLU needs two parts, whose y are its gate and up", op);
  }
  if (a->rope) KS_TRY(check_rope_of_parts(op, ctx, a, &no_rope));
  KS_TRY(check_results(op, ctx, a));
  if (ctx->backend->linears_forward && !empty && !no_rope) return ctx->backend->linears_forward(ctx, a);
  if (a->norm) KS_TRY(ks_rmsnorm_forward(ctx, a->norm));
  for (int64_t i = 0; i < a->n_parts; i++)
    KS_TRY(ks_linear_forward(ctx, &a->parts[i]));
  if (a->swiglu) KS_TRY(ks_swiglu_forward(ctx, a->swiglu));
  return a->rope ? ks_rope_store(ctx, a->rope) : KS_OK;
}

ks_status ks_linears_backward(ks_ctx *ctx, const ks_linears_args *a) {
  const char *op = "linears_backward";
  bool empty;
  KS_TRY(check_ctx(op, ctx, a, true));
  if (a->norm || a->swiglu || a->rope)
    return KS_FAIL(KS_EINVAL, "%s: norm, swiglu and rope are for the forward pass", op);
  KS_TRY(check_parts(op, ctx, a, true, &empty));
  if (ctx->backend->linears_backward && !empty) return ctx->backend->linears_backward(ctx, a);
  for (int64_t i = 0; i < a->n_parts; i++)
    KS_TRY(ks_linear_backward(ctx, &a->parts[i]));
  return KS_OK;
}

/* ---------------------------------------------------------------- attention */

/* Rows of k and v that a sequence may reach. */
static ks_status check_attention_pages(const char *op, const ks_attention_args *a, int64_t s, bool backward,
                                       int64_t *n_rows) {
  const ks_attention_seq *seq = &a->seqs[s];
  *n_rows = seq->n_k;
  if (!seq->pages || seq->n_k <= 0) return KS_OK;
  if (backward)
    return KS_FAIL(KS_EINVAL, "%s: sequence %lld has pages; gradients need rows one after another", op,
                   (long long)s);
  if (a->page_rows <= 0 || a->page_rows % KS_ATTENTION_PAGE_UNIT != 0 || a->n_page_rows < 0)
    return KS_FAIL(KS_EINVAL, "%s: pages of %lld rows in %lld; give a multiple of %d and 0 or more", op,
                   (long long)a->page_rows, (long long)a->n_page_rows, KS_ATTENTION_PAGE_UNIT);
  const int64_t n = (seq->n_k - 1) / a->page_rows + 1, n_pages = a->n_page_rows / a->page_rows;
  for (int64_t i = 0; i < n; i++)
    if (seq->pages[i] < 0 || seq->pages[i] >= n_pages)
      return KS_FAIL(KS_EINVAL,
                     "%s: pages[%lld] of sequence %lld is %d; %lld rows are %lld whole pages of %lld", op,
                     (long long)i, (long long)s, (int)seq->pages[i], (long long)a->n_page_rows,
                     (long long)n_pages, (long long)a->page_rows);
  *n_rows = a->n_page_rows;
  return KS_OK;
}

static ks_status check_attention_seq(const ks_ctx *ctx, const char *op, const ks_attention_args *a, int64_t s,
                                     int64_t previous_end, bool backward) {
  const ks_attention_seq *seq = &a->seqs[s];
  int64_t q_cols = a->n_heads * a->head_dim, kv_cols = a->n_kv_heads * a->head_dim, n_kv = 0, n_rows;
  if (seq->n_q < 0 || seq->n_k < seq->n_q || seq->q_begin < previous_end || seq->q_begin > a->n_rows ||
      seq->n_q > a->n_rows - seq->q_begin)
    return KS_FAIL(
        KS_EINVAL,
        "%s: sequence %lld has queries %lld + %lld and %lld keys; queries are sorted, do not overlap, lie in "
        "%lld rows and are not more than the keys",
        op, (long long)s, (long long)seq->q_begin, (long long)seq->n_q, (long long)seq->n_k,
        (long long)a->n_rows);
  KS_TRY(check_attention_pages(op, a, s, backward, &n_rows));
  /* Columns of a wider buffer: after the last row's heads nothing belongs to the array. */
  if (n_rows > 0 && (!ks_mul_i64(n_rows - 1, a->kv_stride, &n_kv) || n_kv > INT64_MAX - kv_cols))
    return KS_FAIL(KS_EINVAL, "%s: %lld keys of stride %lld do not fit an address space", op,
                   (long long)n_rows, (long long)a->kv_stride);
  if (n_rows > 0) n_kv += kv_cols;
  const span spans[] = {ACT("k", seq->k, n_kv, 1, IN), ACT("v", seq->v, n_kv, 1, IN),
                        backward ? (span)ACT("dq", a->dq, a->n_rows, q_cols, OUT)
                                 : (span)ACT("o", a->o, a->n_rows, q_cols, OUT),
                        F32("lse", a->lse, a->n_rows, a->n_heads, (backward ? IN : OUT) | MAY_BE_NULL)};
  KS_TRY(check_spans(op, spans, N_SPANS(spans)));
  if (!backward) return KS_OK;
  /* dk and dv may be interleaved columns of one buffer, so each is checked alone. */
  const void *grads[] = {seq->dk, seq->dv};
  for (int i = 0; i < 2; i++) {
    const span one[] = {ACT("k", seq->k, n_kv, 1, IN),
                        ACT("v", seq->v, n_kv, 1, IN),
                        ACT("q", a->q, a->n_rows, q_cols, IN),
                        ACT("d_o", a->d_o, a->n_rows, q_cols, IN),
                        ACT("o", a->o, a->n_rows, q_cols, IN),
                        ACT("dq", a->dq, a->n_rows, q_cols, OUT),
                        ACT(i ? "dv" : "dk", grads[i], n_kv, 1, OUT)};
    KS_TRY(check_spans(op, one, N_SPANS(one)));
  }
  if (seq->n_k && seq->dk == seq->dv) return KS_FAIL(KS_EINVAL, "%s: dk and dv are the same memory", op);
  return KS_OK;
}

static ks_status check_attention(const ks_ctx *ctx, const char *op, const ks_attention_args *a,
                                 bool backward) {
  int64_t q_cols, kv_cols;
  if (a->n_heads < 0 || a->n_kv_heads < 0 || a->head_dim < 0 || (a->n_heads > 0 && a->n_kv_heads == 0) ||
      (a->n_kv_heads > 0 && a->n_heads % a->n_kv_heads != 0))
    return KS_FAIL(KS_EINVAL,
                   "%s: %lld query heads and %lld key heads of size %lld; the first must be a multiple", op,
                   (long long)a->n_heads, (long long)a->n_kv_heads, (long long)a->head_dim);
  if (!ks_mul_i64(a->n_heads, a->head_dim, &q_cols) || !ks_mul_i64(a->n_kv_heads, a->head_dim, &kv_cols) ||
      a->kv_stride < kv_cols)
    return KS_FAIL(KS_EINVAL, "%s: kv_stride %lld is less than n_kv_heads * head_dim", op,
                   (long long)a->kv_stride);
  if (!isfinite(a->scale)) return KS_FAIL(KS_EINVAL, "%s: scale is not finite", op);
  if (a->n_seqs < 0 || (a->n_seqs && !a->seqs))
    return KS_FAIL(KS_EINVAL, "%s: seqs is NULL or n_seqs negative", op);
  const span forward_spans[] = {ACT("q", a->q, a->n_rows, q_cols, IN), ACT("o", a->o, a->n_rows, q_cols, OUT),
                                F32("lse", a->lse, a->n_rows, a->n_heads, OUT | MAY_BE_NULL)};
  const span backward_spans[] = {ACT("q", a->q, a->n_rows, q_cols, IN), ACT("o", a->o, a->n_rows, q_cols, IN),
                                 F32("lse", a->lse, a->n_rows, a->n_heads, IN),
                                 ACT("d_o", a->d_o, a->n_rows, q_cols, IN),
                                 ACT("dq", a->dq, a->n_rows, q_cols, OUT)};
  KS_TRY(backward ? check_spans(op, backward_spans, N_SPANS(backward_spans))
                  : check_spans(op, forward_spans, N_SPANS(forward_spans)));
  int64_t end = 0;
  for (int64_t s = 0; s < a->n_seqs; s++) {
    KS_TRY(check_attention_seq(ctx, op, a, s, end, backward));
    end = a->seqs[s].q_begin + a->seqs[s].n_q;
  }
  return KS_OK;
}

ks_status ks_attention_forward(ks_ctx *ctx, const ks_attention_args *a) {
  KS_TRY(CHECK_CTX(attention_forward));
  KS_TRY(check_attention(ctx, "attention_forward", a, false));
  return a->n_seqs && a->n_heads && a->head_dim ? ctx->backend->attention_forward(ctx, a) : KS_OK;
}

ks_status ks_attention_backward(ks_ctx *ctx, const ks_attention_args *a) {
  KS_TRY(CHECK_CTX(attention_backward));
  KS_TRY(check_attention(ctx, "attention_backward", a, true));
  return a->n_seqs && a->n_heads && a->head_dim ? ctx->backend->attention_backward(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- head, sampling */

size_t ks_head_loss_workspace(const ks_ctx *ctx, const ks_weight *w, int64_t n_rows) {
  return ctx && w && n_rows > 0 ? w->backend->head_loss_workspace(ctx, w, n_rows) : 0;
}

ks_status ks_head_loss(ks_ctx *ctx, const ks_head_loss_args *a) {
  KS_TRY(CHECK_CTX(head_loss));
  KS_TRY(check_weight("head_loss", ctx, a->w));
  int64_t n_workspace = (int64_t)(ks_head_loss_workspace(ctx, a->w, a->n_rows) / sizeof(float));
  const span spans[] = {ACT("x", a->x, a->n_rows, a->w->n_in, IN),
                        ARRAY("targets", a->targets, a->n_rows, IN),
                        F32("row_scale", a->row_scale, a->n_rows, 1, IN | MAY_BE_NULL),
                        F32("loss", a->loss, a->n_rows, 1, OUT),
                        ACT("dx", a->dx, a->n_rows, a->w->n_in, OUT | MAY_BE_NULL),
                        F32("workspace", a->workspace, n_workspace, 1, OUT)};
  KS_TRY(check_spans("head_loss", spans, N_SPANS(spans)));
  KS_TRY(check_indices32("head_loss", "targets", a->targets, a->n_rows, a->w->n_out));
  return a->n_rows ? ctx->backend->head_loss(ctx, a) : KS_OK;
}

static ks_status check_sampler(const ks_sampler *s, int64_t i) {
  if (!(s->temperature >= 0) || !isfinite(s->temperature))
    return KS_FAIL(KS_EINVAL, "sample: samplers[%lld].temperature is %g; give a finite number of 0 or more",
                   (long long)i, (double)s->temperature);
  if (s->top_k < 0)
    return KS_FAIL(KS_EINVAL, "sample: samplers[%lld].top_k is %d; give 0 (all) or more", (long long)i,
                   (int)s->top_k);
  if (!(s->top_p > 0 && s->top_p <= 1))
    return KS_FAIL(KS_EINVAL, "sample: samplers[%lld].top_p is %g; give more than 0, up to 1", (long long)i,
                   (double)s->top_p);
  return KS_OK;
}

ks_status ks_sample(ks_ctx *ctx, const ks_sample_args *a) {
  KS_TRY(CHECK_CTX(sample));
  const span spans[] = {F32("logits", a->logits, a->n_rows, a->n_vocab, IN),
                        {"samplers", a->samplers, a->n_rows, 1, sizeof(ks_sampler), IN},
                        ARRAY("tokens", a->tokens, a->n_rows, OUT),
                        ARRAY("drawn", a->drawn, a->n_rows, OUT | MAY_BE_NULL)};
  if (a->n_vocab > INT32_MAX || (a->n_rows > 0 && a->n_vocab < 1))
    return KS_FAIL(KS_EINVAL, "sample: n_vocab is %lld; give 1 to 2^31 - 1", (long long)a->n_vocab);
  KS_TRY(check_spans("sample", spans, N_SPANS(spans)));
  for (int64_t i = 0; i < a->n_rows; i++)
    KS_TRY(check_sampler(&a->samplers[i], i));
  return a->n_rows ? ctx->backend->sample(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- optimizer */

static ks_status check_adamw_job(const ks_adamw_job *job, int64_t i) {
  const span spans[] = {ARRAY("p", job->p, job->n, OUT), ARRAY("m", job->m, job->n, OUT),
                        ARRAY("v", job->v, job->n, OUT), ARRAY("grad", job->grad, job->n, OUT)};
  KS_TRY_AS(check_spans("adamw", spans, N_SPANS(spans)), "job %lld", (long long)i);
  KS_TRY_AS(check_eps("adamw", job->eps), "job %lld", (long long)i);
  if (!(job->beta1 >= 0 && job->beta1 < 1 && job->beta2 >= 0 && job->beta2 < 1))
    return KS_FAIL(KS_EINVAL, "adamw: job %lld has betas %g and %g; give 0 or more and less than 1",
                   (long long)i, job->beta1, job->beta2);
  if (!isfinite(job->lr) || !isfinite(job->weight_decay) || !(job->max_grad_norm >= 0))
    return KS_FAIL(KS_EINVAL,
                   "adamw: job %lld has lr %g, weight_decay %g, max_grad_norm %g; give finite numbers, the "
                   "last 0 or more",
                   (long long)i, job->lr, job->weight_decay, job->max_grad_norm);
  if (job->step < 1)
    return KS_FAIL(KS_EINVAL, "adamw: job %lld has step %lld; steps count from 1", (long long)i,
                   (long long)job->step);
  return KS_OK;
}

/* That no two jobs share memory is the caller's to see to. */
ks_status ks_adamw(ks_ctx *ctx, const ks_adamw_args *a) {
  KS_TRY(CHECK_CTX(adamw));
  const span spans[] = {{"jobs", a->jobs, a->n_jobs, 1, sizeof *a->jobs, IN},
                        ARRAY("norm", a->norm, a->n_jobs, OUT)};
  KS_TRY(check_spans("adamw", spans, N_SPANS(spans)));
  for (int64_t i = 0; i < a->n_jobs; i++)
    KS_TRY(check_adamw_job(&a->jobs[i], i));
  return a->n_jobs ? ctx->backend->adamw(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- embeddings */

ks_status ks_pool(ks_ctx *ctx, const ks_pool_args *a) {
  KS_TRY(CHECK_CTX(pool));
  if (a->n_seqs < 0 || a->n_seqs == INT64_MAX)
    return KS_FAIL(KS_EINVAL, "pool: n_seqs is %lld", (long long)a->n_seqs);
  const span spans[] = {ACT("x", a->x, a->n_rows, a->n_cols, IN),
                        ARRAY("seq_offsets", a->seq_offsets, a->n_seqs ? a->n_seqs + 1 : 0, IN),
                        F32("y", a->y, a->n_seqs, a->n_cols, OUT)};
  KS_TRY(check_spans("pool", spans, N_SPANS(spans)));
  if (a->pooling != KS_POOL_LAST && a->pooling != KS_POOL_MEAN)
    return KS_FAIL(KS_EINVAL, "pool: pooling is %d", (int)a->pooling);
  for (int64_t s = 0; s < a->n_seqs; s++) {
    int64_t begin = a->seq_offsets[s], end = a->seq_offsets[s + 1];
    if (begin < 0 || begin >= end || end > a->n_rows)
      return KS_FAIL(KS_EINVAL, "pool: sequence %lld has rows %lld to %lld of %lld; each needs a row",
                     (long long)s, (long long)begin, (long long)end, (long long)a->n_rows);
  }
  return a->n_seqs && a->n_cols ? ctx->backend->pool(ctx, a) : KS_OK;
}

ks_status ks_entropy(ks_ctx *ctx, const ks_entropy_args *a) {
  KS_TRY(CHECK_CTX(entropy));
  const span spans[] = {F32("x", a->x, a->n_rows, a->n_cols, IN), ARRAY("h", a->h, a->n_rows, OUT)};
  KS_TRY(check_spans("entropy", spans, N_SPANS(spans)));
  if ((int)a->kind < 0 || a->kind > KS_ENTROPY_ABS)
    return KS_FAIL(KS_EINVAL, "entropy: kind is %d", (int)a->kind);
  bool histogram = a->kind == KS_ENTROPY_HISTOGRAM || a->kind == KS_ENTROPY_CLIPPED;
  if (histogram && (a->n_bins < 1 || a->n_bins > 4096))
    return KS_FAIL(KS_EINVAL, "entropy: n_bins is %lld; give 1 to 4096", (long long)a->n_bins);
  if (a->kind == KS_ENTROPY_CLIPPED && !(a->clip > 0))
    return KS_FAIL(KS_EINVAL, "entropy: clip is %g; give more than 0", a->clip);
  return a->n_rows ? ctx->backend->entropy(ctx, a) : KS_OK;
}

/* ---------------------------------------------------------------- similarity */

static bool is_embedding_dtype(ks_dtype t) {
  return t == KS_DTYPE_F32 || t == KS_DTYPE_BF16 || t == KS_DTYPE_I8;
}

static ks_status check_similarity(const char *op, const ks_similarity_args *a, const span *outs, int n_outs) {
  if (!is_embedding_dtype(a->q_dtype) || !is_embedding_dtype(a->k_dtype))
    return KS_FAIL(KS_EINVAL, "%s: embeddings are f32, bf16 or i8, not '%s' and '%s'", op,
                   ks_dtype_name(a->q_dtype), ks_dtype_name(a->k_dtype));
  if ((a->q_scales && a->q_dtype != KS_DTYPE_I8) || (a->k_scales && a->k_dtype != KS_DTYPE_I8))
    return KS_FAIL(KS_EINVAL, "%s: factors of rows belong to i8 embeddings", op);
  span spans[16] = {{"q", a->q, a->n_q, a->n_cols, ks_dtype_size(a->q_dtype), IN},
                    {"k", a->k, a->n_k, a->n_cols, ks_dtype_size(a->k_dtype), IN},
                    ARRAY("q_scales", a->q_scales, a->n_q, IN | MAY_BE_NULL),
                    ARRAY("k_scales", a->k_scales, a->n_k, IN | MAY_BE_NULL)};
  for (int i = 0; i < n_outs; i++)
    spans[4 + i] = outs[i];
  KS_TRY(check_spans(op, spans, 4 + n_outs));
  if (a->metric != KS_METRIC_COSINE && a->metric != KS_METRIC_DOT)
    return KS_FAIL(KS_EINVAL, "%s: metric is %d", op, (int)a->metric);
  return KS_OK;
}

ks_status ks_similarity(ks_ctx *ctx, const ks_similarity_args *a, float *s) {
  KS_TRY(CHECK_CTX(similarity));
  const span outs[] = {F32("s", s, a->n_q, a->n_k, OUT)};
  KS_TRY(check_similarity("similarity", a, outs, N_SPANS(outs)));
  return a->n_q && a->n_k ? ctx->backend->similarity(ctx, a, s) : KS_OK;
}

ks_status ks_similarity_top(ks_ctx *ctx, const ks_similarity_args *a, int64_t best_k, float *scores,
                            int64_t *index) {
  KS_TRY(CHECK_CTX(similarity_top));
  if (best_k < 1 || best_k > 1024)
    return KS_FAIL(KS_EINVAL, "similarity_top: best_k is %lld; give 1 to 1024", (long long)best_k);
  const span outs[] = {F32("scores", scores, a->n_q, best_k, OUT),
                       {"index", index, a->n_q, best_k, sizeof *index, OUT}};
  KS_TRY(check_similarity("similarity_top", a, outs, N_SPANS(outs)));
  return a->n_q ? ctx->backend->similarity_top(ctx, a, best_k, scores, index) : KS_OK;
}

ks_status ks_similarity_mean(ks_ctx *ctx, const ks_similarity_args *a, const ks_similarity_groups *groups,
                             double *mean, int64_t *count) {
  const ks_similarity_groups g = groups ? *groups : (ks_similarity_groups){0};
  KS_TRY(CHECK_CTX(similarity_mean));
  const span outs[] = {ARRAY("mean", mean, a->n_q, OUT), ARRAY("count", count, a->n_q, OUT),
                       ARRAY("groups.keys", g.keys, a->n_k, IN | MAY_BE_NULL),
                       ARRAY("groups.queries", g.queries, a->n_q, IN | MAY_BE_NULL),
                       ARRAY("groups.except", g.except, a->n_q, IN | MAY_BE_NULL)};
  KS_TRY(check_similarity("similarity_mean", a, outs, N_SPANS(outs)));
  if (a->n_q && a->n_k && !g.keys != !g.queries)
    return KS_FAIL(KS_EINVAL, "similarity_mean: give groups of both keys and queries, or of neither");
  return a->n_q ? ctx->backend->similarity_mean(ctx, a, &g, mean, count) : KS_OK;
}

ks_status ks_similarity_farthest_first(ks_ctx *ctx, const ks_similarity_args *a, int64_t n_pick,
                                       int64_t first, int64_t *picked) {
  const char *op = "similarity_farthest_first";
  KS_TRY(CHECK_CTX(similarity_farthest_first));
  const span outs[] = {ARRAY("picked", picked, n_pick, OUT)};
  KS_TRY(check_similarity(op, a, outs, N_SPANS(outs)));
  if (n_pick > a->n_k)
    return KS_FAIL(KS_EINVAL, "%s: n_pick is %lld of %lld rows", op, (long long)n_pick, (long long)a->n_k);
  if (n_pick && a->n_q == 0) KS_TRY(check_index(op, "first", 0, first, a->n_k));
  return n_pick ? ctx->backend->similarity_farthest_first(ctx, a, n_pick, first, picked) : KS_OK;
}
