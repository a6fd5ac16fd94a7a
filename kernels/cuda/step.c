/* Steps: the list of what a step queued, its comparison with what comes the next time, and its CUDA graph.
 *
 * RECORD: everything goes on the stream at once and into the list. COMPARE: the list is complete; whatever
 * comes is compared with its next entry and nothing is queued. The end of such a step uploads what the host
 * staged, in one copy, launches the list as a graph (made the first time it is needed) and fetches the late
 * outputs, in one copy. The first difference uploads what was staged so far, queues the entries that were
 * held back, cuts the list there and goes on in RECORD.
 *
 * Addresses are part of the list, so staged arrays and late outputs lie in blocks that belong to the step:
 * the n-th call of ks_cuda_stage always gets the same address. Calls with the same bytes share a slot; when a
 * call that shared one comes with other bytes, that is a difference. The opposite, equal bytes in two slots,
 * is none.
 *
 * Uploads and fetches are not part of the graph: they go through pinned memory that changes from step to
 * step, so steps may be queued ahead of the device.
 *
 * Host time of a decoding step from begin to end, all of it comparing, measured with launches and copies left out (one core of a
 * virtual AMD EPYC that others used too, so an upper bound): one row, 16 layers, about 105 launches and 97 staged arrays: 37 us;
 * with an adapter 170 and 161: 52 us; 26 layers: 61 us. Another step was recorded anew for every hundred.
 *
 * Limits: 32 steps are kept, then one is forgotten (goes_before). A kernel has at most 128 arguments. */
#include "kernels/cuda/cuda_impl.h"

enum { MAX_STEPS = 32, BLOCK_BYTES = 1 << 18, ARG_ALIGN = 16, LATE_PENDING_BYTES = 64 << 20 };

typedef struct {
  ks_cuda_op op;
  size_t args_at; /* launches: in step.args, uint32 sizes and then the arguments, each aligned to 16 */
} entry;

typedef struct {
  unsigned char *device, *image; /* image: the host's copy; NULL for late outputs */
  size_t size, used;
} block;

/* A staged array or a late output. */
typedef struct {
  int block;
  size_t at, bytes;
  uint64_t hash;
} slot;

typedef struct {
  block *items;
  size_t n, cap;
} blocks;

typedef struct {
  uint64_t key, used_at;
  bool is_complete, no_graph;
  entry *entries;
  size_t n_entries, cap_entries;
  unsigned char *args;
  size_t args_used, cap_args;
  slot *slots;
  size_t n_slots, cap_slots;
  size_t *calls; /* slot of each call of ks_cuda_stage */
  size_t n_calls, cap_calls;
  slot *lates;
  size_t n_lates, cap_lates;
  blocks staged, late;
  cudaGraphExec_t graph;
} step;

struct ks_cuda_steps {
  step items[MAX_STEPS];
  int n;
  uint64_t clock;
  step *now; /* NULL: not inside one */
  bool comparing, failed;
  size_t at_entry, at_call, at_slot, at_late;
  void **hosts; /* of the late outputs of this run */
  size_t cap_hosts;
};

bool ks_cuda_in_step(const ks_ctx *ctx) {
  const ks_cuda_steps *s = ks_cuda_of(ctx)->steps;
  return s && s->now;
}

/* ---------------------------------------------------------------- blocks */

static size_t round_up(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

static ks_status block_add(ks_ctx *ctx, blocks *b, size_t bytes, bool with_image) {
  block made = {.size = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES};
  void *device = NULL;
  KS_TRY(ks_cuda_grow(&b->items, &b->cap, b->n + 1, sizeof *b->items, "step"));
  if (with_image) KS_TRY(ks_alloc_array(&made.image, made.size, 1, "step"));
  ks_status status = ks_cuda_alloc(ctx, "step", made.size, &device);
  if (status != KS_OK) {
    free(made.image);
    return status;
  }
  ks_mem_account(ctx, made.size, 0);
  made.device = device;
  b->items[b->n++] = made;
  return KS_OK;
}

static ks_status block_take(ks_ctx *ctx, blocks *b, size_t bytes, bool with_image, slot *out) {
  const size_t room = round_up(bytes, 64);
  size_t i = 0;
  while (i < b->n && b->items[i].size - b->items[i].used < room)
    i++;
  if (i == b->n) KS_TRY(block_add(ctx, b, room, with_image));
  *out = (slot){.block = (int)i, .at = b->items[i].used, .bytes = bytes};
  b->items[i].used += room;
  return KS_OK;
}

static void blocks_cut(blocks *b, const slot *slots, size_t n) {
  for (size_t i = 0; i < b->n; i++)
    b->items[i].used = 0;
  for (size_t i = 0; i < n; i++) {
    block *of = &b->items[slots[i].block];
    const size_t end = slots[i].at + round_up(slots[i].bytes, 64);
    if (end > of->used) of->used = end;
  }
}

static void blocks_free(ks_ctx *ctx, blocks *b) {
  for (size_t i = 0; i < b->n; i++) {
    ks_mem_account(ctx, 0, b->items[i].size);
    cudaFree(b->items[i].device);
    free(b->items[i].image);
  }
  free(b->items);
}

/* ---------------------------------------------------------------- entries */

static bool same_dim(dim3 a, dim3 b) {
  return a.x == b.x && a.y == b.y && a.z == b.z;
}

static bool same_launch(const step *s, const entry *e, const ks_cuda_launch_params *p) {
  const ks_cuda_launch_params *had = &e->op.u.launch;
  if (had->func != p->func || !same_dim(had->grid, p->grid) || !same_dim(had->block, p->block) ||
      had->smem_bytes != p->smem_bytes || had->n_args != p->n_args)
    return false;
  const unsigned char *base = s->args + e->args_at;
  size_t at = round_up((size_t)p->n_args * sizeof(uint32_t), ARG_ALIGN);
  for (int i = 0; i < p->n_args; i++) {
    uint32_t size;
    memcpy(&size, base + (size_t)i * sizeof size, sizeof size);
    if (size != p->arg_sizes[i] || memcmp(base + at, p->args[i], size) != 0) return false;
    at += round_up(size, ARG_ALIGN);
  }
  return true;
}

static bool same_matmul(const ks_cuda_matmul_params *a, const ks_cuda_matmul_params *b) {
  return a->x == b->x && a->w == b->w && a->y == b->y && a->bias == b->bias && a->n_rows == b->n_rows &&
         a->n_out == b->n_out && a->n_in == b->n_in && a->w_transposed == b->w_transposed && a->c == b->c &&
         a->x_dtype == b->x_dtype && a->w_dtype == b->w_dtype && a->y_dtype == b->y_dtype;
}

static bool same_entry(const step *s, const entry *e, const ks_cuda_op *op) {
  const ks_cuda_op *had = &e->op;
  if (had->kind != op->kind) return false;
  switch (op->kind) {
  case KS_CUDA_OP_LAUNCH:
    return same_launch(s, e, &op->u.launch);
  case KS_CUDA_OP_MATMUL:
    return same_matmul(&had->u.matmul, &op->u.matmul);
  case KS_CUDA_OP_FILL:
    return had->u.fill.dst == op->u.fill.dst && had->u.fill.bytes == op->u.fill.bytes &&
           had->u.fill.byte == op->u.fill.byte;
  case KS_CUDA_OP_COPY:
    return had->u.copy.dst == op->u.copy.dst && had->u.copy.src == op->u.copy.src &&
           had->u.copy.bytes == op->u.copy.bytes;
  }
  return false;
}

static ks_status keep_args(step *s, const ks_cuda_launch_params *p) {
  const size_t sizes = round_up((size_t)p->n_args * sizeof(uint32_t), ARG_ALIGN);
  size_t bytes = sizes;
  for (int i = 0; i < p->n_args; i++)
    bytes += round_up(p->arg_sizes[i], ARG_ALIGN);
  KS_TRY(ks_cuda_grow(&s->args, &s->cap_args, s->args_used + bytes, 1, "step"));
  unsigned char *base = s->args + s->args_used, *at = base + sizes;
  for (int i = 0; i < p->n_args; i++) {
    const uint32_t size = (uint32_t)p->arg_sizes[i];
    memcpy(base + (size_t)i * sizeof size, &size, sizeof size);
    memcpy(at, p->args[i], size);
    at += round_up(size, ARG_ALIGN);
  }
  s->args_used += bytes;
  return KS_OK;
}

static ks_status keep_entry(step *s, const ks_cuda_op *op) {
  entry e = {.op = *op, .args_at = s->args_used};
  KS_TRY(ks_cuda_grow(&s->entries, &s->cap_entries, s->n_entries + 1, sizeof *s->entries, "step"));
  if (op->kind == KS_CUDA_OP_LAUNCH) {
    KS_TRY(keep_args(s, &op->u.launch));
    e.op.u.launch.args = NULL;
    e.op.u.launch.arg_sizes = NULL;
  }
  s->entries[s->n_entries++] = e;
  return KS_OK;
}

static ks_status execute_entry(ks_ctx *ctx, const step *s, const entry *e) {
  if (e->op.kind != KS_CUDA_OP_LAUNCH) return ks_cuda_execute(ctx, &e->op);
  ks_cuda_op op = e->op;
  void *args[KS_CUDA_MAX_ARGS];
  size_t sizes[KS_CUDA_MAX_ARGS];
  unsigned char *base = s->args + e->args_at;
  size_t at = round_up((size_t)op.u.launch.n_args * sizeof(uint32_t), ARG_ALIGN);
  for (int i = 0; i < op.u.launch.n_args; i++) {
    uint32_t size;
    memcpy(&size, base + (size_t)i * sizeof size, sizeof size);
    args[i] = base + at;
    sizes[i] = size;
    at += round_up(size, ARG_ALIGN);
  }
  op.u.launch.args = args;
  op.u.launch.arg_sizes = sizes;
  return ks_cuda_execute(ctx, &op);
}

static ks_status execute_entries(ks_ctx *ctx, const step *s) {
  for (size_t i = 0; i < s->n_entries; i++)
    KS_TRY(execute_entry(ctx, s, &s->entries[i]));
  return KS_OK;
}

/* ---------------------------------------------------------------- the two ways */

static uint64_t hash_bytes(const void *p, size_t bytes) {
  const unsigned char *at = p;
  uint64_t h = 0x9e3779b97f4a7c15u ^ bytes;
  for (; bytes >= 8; at += 8, bytes -= 8) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    h = (h ^ word) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  for (; bytes > 0; at++, bytes--)
    h = (h ^ *at) * 0x100000001b3u;
  return h ^ h >> 29;
}

/* The hashes of the slots that this run has filled: a run that only compares makes none. */
static void hash_slots(step *s) {
  for (size_t i = 0; i < s->n_slots; i++)
    s->slots[i].hash =
        hash_bytes(s->staged.items[s->slots[i].block].image + s->slots[i].at, s->slots[i].bytes);
}

static ks_status upload(ks_ctx *ctx, const step *s) {
  for (size_t i = 0; i < s->staged.n; i++) {
    const block *b = &s->staged.items[i];
    KS_TRY(ks_cuda_send(ctx, "step", b->device, b->image, b->used));
  }
  return KS_OK;
}

static void drop_graph(step *s) {
  if (s->graph) cudaGraphExecDestroy(s->graph);
  s->graph = NULL;
  s->no_graph = false;
  s->is_complete = false;
}

/* Keeps what the present run has confirmed. */
static void cut(ks_cuda_steps *steps) {
  step *s = steps->now;
  drop_graph(s);
  if (steps->at_entry < s->n_entries) s->args_used = s->entries[steps->at_entry].args_at;
  s->n_entries = steps->at_entry;
  s->n_calls = steps->at_call;
  s->n_slots = steps->at_slot;
  s->n_lates = steps->at_late;
  blocks_cut(&s->staged, s->slots, s->n_slots);
  blocks_cut(&s->late, s->lates, s->n_lates);
  steps->comparing = false;
}

ks_status ks_cuda_step_flush(ks_ctx *ctx) {
  ks_cuda_steps *steps = ks_cuda_of(ctx)->steps;
  if (!steps || !steps->now || !steps->comparing) return KS_OK;
  cut(steps);
  hash_slots(steps->now);
  ks_cuda_of(ctx)->counts.steps_differing++;
  ks_status status = upload(ctx, steps->now);
  if (status == KS_OK) status = execute_entries(ctx, steps->now);
  if (status != KS_OK) steps->failed = true;
  return status;
}

static ks_status record(ks_ctx *ctx, ks_cuda_steps *steps, const ks_cuda_op *op) {
  ks_status status = keep_entry(steps->now, op);
  if (status == KS_OK) status = ks_cuda_execute(ctx, op);
  if (status != KS_OK) steps->failed = true;
  steps->at_entry = steps->now->n_entries;
  return status;
}

ks_status ks_cuda_queue(ks_ctx *ctx, const ks_cuda_op *op) {
  ks_cuda_steps *steps = ks_cuda_of(ctx)->steps;
  if (!steps || !steps->now) return ks_cuda_execute(ctx, op);
  const step *s = steps->now;
  if (steps->comparing) {
    if (steps->at_entry < s->n_entries && same_entry(s, &s->entries[steps->at_entry], op)) {
      steps->at_entry++;
      return KS_OK;
    }
    KS_TRY(ks_cuda_step_flush(ctx));
  }
  return record(ctx, steps, op);
}

/* ---------------------------------------------------------------- staging */

static bool holds(const step *s, const slot *has, const void *host, size_t bytes) {
  return has->bytes == bytes && memcmp(s->staged.items[has->block].image + has->at, host, bytes) == 0;
}

/* In COMPARE: true when the call fits the list; *index: its slot. */
static bool follows(ks_cuda_steps *steps, const void *host, size_t bytes, size_t *index) {
  step *s = steps->now;
  if (steps->at_call >= s->n_calls) return false;
  *index = s->calls[steps->at_call];
  const slot *has = &s->slots[*index];
  if (*index < steps->at_slot) return holds(s, has, host, bytes);
  if (has->bytes != bytes) return false;
  memcpy(s->staged.items[has->block].image + has->at, host, bytes);
  steps->at_slot = *index + 1;
  return true;
}

static ks_status new_slot(ks_ctx *ctx, step *s, const void *host, size_t bytes, uint64_t hash) {
  slot made;
  KS_TRY(ks_cuda_grow(&s->slots, &s->cap_slots, s->n_slots + 1, sizeof *s->slots, "step"));
  KS_TRY(block_take(ctx, &s->staged, bytes, true, &made));
  made.hash = hash;
  s->slots[s->n_slots++] = made;
  const block *b = &s->staged.items[made.block];
  memcpy(b->image + made.at, host, bytes);
  return ks_cuda_send(ctx, "staging", b->device + made.at, host, bytes);
}

static ks_status stage_recorded(ks_ctx *ctx, ks_cuda_steps *steps, const void *host, size_t bytes,
                                size_t *index) {
  step *s = steps->now;
  const uint64_t hash = hash_bytes(host, bytes);
  KS_TRY(ks_cuda_grow(&s->calls, &s->cap_calls, s->n_calls + 1, sizeof *s->calls, "step"));
  size_t i = 0;
  while (i < s->n_slots && !(s->slots[i].hash == hash && holds(s, &s->slots[i], host, bytes)))
    i++;
  if (i == s->n_slots)
    KS_TRY(new_slot(ctx, s, host, bytes, hash));
  else
    ks_cuda_of(ctx)->counts.stages_shared++;
  s->calls[s->n_calls++] = i;
  steps->at_slot = s->n_slots;
  *index = i;
  return KS_OK;
}

ks_status ks_cuda_step_stage(ks_ctx *ctx, const void *host, size_t bytes, const void **device) {
  ks_cuda_steps *steps = ks_cuda_of(ctx)->steps;
  step *s = steps->now;
  size_t index = 0;
  ks_status status = KS_OK;
  if (!steps->comparing || !follows(steps, host, bytes, &index)) {
    status = ks_cuda_step_flush(ctx);
    if (status == KS_OK) status = stage_recorded(ctx, steps, host, bytes, &index);
    if (status != KS_OK) {
      steps->failed = true;
      return status;
    }
  }
  steps->at_call++;
  *device = s->staged.items[s->slots[index].block].device + s->slots[index].at;
  return KS_OK;
}

/* ---------------------------------------------------------------- late outputs */

/* The device copies to the step's own block at its place in the list; the end of the step fetches all of
 * them. */
ks_status ks_cuda_step_deliver(ks_ctx *ctx, void *host, const void *device, size_t bytes) {
  ks_cuda_steps *steps = ks_cuda_of(ctx)->steps;
  step *s = steps->now;
  ks_status status = KS_OK;
  if (steps->comparing && !(steps->at_late < s->n_lates && s->lates[steps->at_late].bytes == bytes))
    status = ks_cuda_step_flush(ctx);
  if (status == KS_OK && !steps->comparing) {
    slot made = {0};
    status = ks_cuda_grow(&s->lates, &s->cap_lates, s->n_lates + 1, sizeof *s->lates, "step");
    if (status == KS_OK) status = block_take(ctx, &s->late, bytes, false, &made);
    if (status == KS_OK) s->lates[s->n_lates++] = made;
  }
  if (status == KS_OK)
    status = ks_cuda_grow(&steps->hosts, &steps->cap_hosts, steps->at_late + 1, sizeof *steps->hosts, "step");
  if (status != KS_OK) {
    steps->failed = true;
    return status;
  }
  const slot *to = &s->lates[steps->at_late];
  steps->hosts[steps->at_late++] = host;
  return ks_cuda_copy(ctx, s->late.items[to->block].device + to->at, device, bytes);
}

static ks_status fetch_late(ks_ctx *ctx, const ks_cuda_steps *steps, const step *s) {
  for (size_t b = 0; b < s->late.n; b++) {
    void *pinned;
    if (s->late.items[b].used == 0) continue;
    KS_TRY(ks_cuda_late_fetch(ctx, s->late.items[b].device, s->late.items[b].used, &pinned));
    for (size_t i = 0; i < s->n_lates; i++)
      if ((size_t)s->lates[i].block == b)
        KS_TRY(ks_cuda_late_note(ctx, steps->hosts[i], (char *)pinned + s->lates[i].at, s->lates[i].bytes));
  }
  return KS_OK;
}

/* ---------------------------------------------------------------- begin, end */

/* A step that never came again goes before one that did, so that many that come once (prompts of all lengths) leave those that
 * come all the time; else the one unused for longer. What did not come for so many steps that all places could have been filled
 * several times has no such right: else old graphs would leave one place for everything new. */
static bool goes_before(const step *a, const step *b, uint64_t now) {
  enum { RIGHT = 4 * MAX_STEPS };
  const bool a_stays = a->graph && now - a->used_at < RIGHT, b_stays = b->graph && now - b->used_at < RIGHT;
  if (a_stays != b_stays) return b_stays;
  return a->used_at < b->used_at;
}

static step *find_step(ks_cuda_steps *steps, uint64_t key) {
  step *oldest = &steps->items[0];
  for (int i = 0; i < steps->n; i++) {
    if (steps->items[i].key == key) return &steps->items[i];
    if (goes_before(&steps->items[i], oldest, steps->clock)) oldest = &steps->items[i];
  }
  if (steps->n < MAX_STEPS)
    oldest = &steps->items[steps->n++];
  else
    drop_graph(oldest); /* its memory is used again */
  oldest->key = key;
  return oldest;
}

ks_status ks_cuda_step_begin(ks_ctx *ctx, uint64_t key) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(ks_cuda_alive(ctx, "ks_step_begin"));
  if (!cuda->steps) KS_TRY(ks_alloc_array(&cuda->steps, 1, sizeof *cuda->steps, "steps"));
  ks_cuda_steps *steps = cuda->steps;
  if (steps->now) return KS_FAIL(KS_EINVAL, "ks_step_begin: a step has begun already; steps do not nest");
  steps->now = find_step(steps, key);
  steps->now->used_at = ++steps->clock;
  steps->failed = false;
  steps->at_entry = steps->at_call = steps->at_slot = steps->at_late = 0;
  steps->comparing = steps->now->is_complete && !cuda->no_graphs;
  if (!steps->comparing) cut(steps);
  return KS_OK;
}

/* A list that cannot be captured is queued entry by entry, for good. */
static void make_graph(ks_ctx *ctx, step *s) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  const ks_cuda_counts counts = cuda->counts;
  cudaGraph_t graph = NULL;
  cuda->capturing = true;
  if (cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeRelaxed) == cudaSuccess) {
    ks_status status = execute_entries(ctx, s);
    cudaError_t e = cudaStreamEndCapture(cuda->stream, &graph);
    if (status == KS_OK && e == cudaSuccess && cudaGraphInstantiate(&s->graph, graph, 0) != cudaSuccess)
      s->graph = NULL;
    if (s->graph &&
        cudaGraphUpload(s->graph, cuda->stream) != cudaSuccess) { /* no memory for it: better now */
      cudaGraphExecDestroy(s->graph);
      s->graph = NULL;
    }
    if (graph) cudaGraphDestroy(graph);
    if (status != KS_OK) ks_error_clear();
  }
  cuda->capturing = false;
  cudaGetLastError();
  cuda->counts = counts;
  s->no_graph = s->graph == NULL;
  cuda->counts.graphs += !s->no_graph;
  cuda->counts.graphs_failed += s->no_graph;
}

static ks_status replay(ks_ctx *ctx, step *s) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(upload(ctx, s));
  if (!s->graph && !s->no_graph && s->n_entries > 0) make_graph(ctx, s);
  if (!s->graph) return execute_entries(ctx, s);
  KS_TRY(ks_cuda_activity_begin(ctx));
  cuda->activity.graphs++;
  KS_CUDA_TRY(ctx, "ks_step_end", cudaGraphLaunch(s->graph, cuda->stream));
  return KS_OK;
}

ks_status ks_cuda_step_end(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  ks_cuda_steps *steps = cuda->steps;
  if (!steps || !steps->now) return KS_FAIL(KS_EINVAL, "ks_step_end: no step has begun");
  step *s = steps->now;
  ks_status status = KS_OK;
  const bool given_up = steps->failed || cuda->broken[0];
  if (!given_up && steps->comparing) {
    if (steps->at_entry == s->n_entries && steps->at_call == s->n_calls && steps->at_late == s->n_lates) {
      status = replay(ctx, s);
      cuda->counts.steps_replayed++;
    } else
      status = ks_cuda_step_flush(ctx);
  }
  if (!given_up && !steps->comparing) cuda->counts.steps_recorded++;
  if (!given_up && status == KS_OK) status = fetch_late(ctx, steps, s);
  steps->now = NULL;
  if (given_up || status != KS_OK)
    drop_graph(s); /* a failed step leaves nothing behind */
  else
    s->is_complete = true;
  if (status == KS_OK && cuda->late.pending_bytes > LATE_PENDING_BYTES) status = ks_cuda_finish(ctx);
  return status;
}

void ks_cuda_steps_exit(ks_ctx *ctx) {
  ks_cuda_steps *steps = ks_cuda_of(ctx)->steps;
  if (!steps) return;
  for (int i = 0; i < steps->n; i++) {
    step *s = &steps->items[i];
    drop_graph(s);
    blocks_free(ctx, &s->staged);
    blocks_free(ctx, &s->late);
    void *arrays[] = {s->entries, s->args, s->slots, s->calls, s->lates};
    for (size_t k = 0; k < sizeof arrays / sizeof arrays[0]; k++)
      free(arrays[k]);
  }
  free(steps->hosts);
  free(steps);
  ks_cuda_of(ctx)->steps = NULL;
}
