/* Host arrays on their way to the device, late outputs on their way back, workspace.
 *
 * A ring is a queue of segments. The last one is filled; when it is full the oldest comes again, if its bytes
 * are old enough and the device has copied them (an event says so), else the ring grows. Device memory of a
 * segment is written on the stream, behind every kernel that read what was there before, so it needs no event
 * of its own. */
#include "kernels/cuda/cuda_impl.h"

enum {
  SEGMENT_BYTES = 1 << 20,
  UPLOAD_BYTES = 8 << 20,
  LATE_BLOCK_BYTES = 1 << 16,
  LATE_PENDING_BYTES = 64 << 20
};

static size_t round_up(size_t bytes) {
  return (bytes + 63) & ~(size_t)63;
}

/* ---------------------------------------------------------------- rings */

static void segment_free(ks_ctx *ctx, ks_cuda_segment *s, bool with_device) {
  if (with_device && s->device) ks_mem_account(ctx, 0, s->size);
  cudaFree(s->device);
  cudaFreeHost(s->host);
  if (s->left) cudaEventDestroy(s->left);
  *s = (ks_cuda_segment){0};
}

static ks_status segment_make(ks_ctx *ctx, const ks_cuda_ring *ring, size_t bytes, ks_cuda_segment *s) {
  *s = (ks_cuda_segment){.size = bytes > SEGMENT_BYTES ? bytes : SEGMENT_BYTES};
  void *host = NULL, *device = NULL;
  ks_status status = KS_OK;
  cudaError_t e = cudaHostAlloc(&host, s->size, cudaHostAllocDefault);
  s->host = host;
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&s->left, cudaEventDisableTiming);
  if (e != cudaSuccess) {
    status = ks_cuda_failed(ctx, "staging", "pinned memory", e);
  } else if (ring->with_device) {
    status = ks_cuda_alloc(ctx, "staging", s->size, &device);
    s->device = device;
    if (status == KS_OK) ks_mem_account(ctx, s->size, 0);
  }
  if (status != KS_OK) segment_free(ctx, s, ring->with_device);
  return status;
}

static size_t ring_bytes(const ks_cuda_ring *ring) {
  size_t sum = 0;
  for (int i = 0; i < ring->n_segments; i++)
    sum += ring->segments[i].size;
  return sum;
}

/* Whether the oldest segment may be written again, perhaps after waiting for its copies. */
static bool may_reuse(const ks_cuda_ring *ring) {
  if (ring->n_segments == 0) return false;
  const ks_cuda_segment *s = &ring->segments[0];
  if (ring->total - s->stamp < ring->life_bytes) return false;
  if (ring->life_bytes > 0) return true;
  if (ring_bytes(ring) >= UPLOAD_BYTES) return true;
  const bool done = cudaEventQuery(s->left) == cudaSuccess;
  cudaGetLastError();
  return done;
}

/* Takes the oldest segment out; *s is empty when there is none to be had or it is too small. */
static ks_status take_oldest(ks_ctx *ctx, ks_cuda_ring *ring, size_t bytes, ks_cuda_segment *s) {
  *s = (ks_cuda_segment){0};
  if (!may_reuse(ring)) return KS_OK;
  KS_CUDA_TRY(ctx, "staging", cudaEventSynchronize(ring->segments[0].left));
  *s = ring->segments[0];
  ring->n_segments--;
  memmove(ring->segments, ring->segments + 1, (size_t)ring->n_segments * sizeof *ring->segments);
  if (s->size < bytes) segment_free(ctx, s, ring->with_device);
  return KS_OK;
}

static ks_status next_segment(ks_ctx *ctx, ks_cuda_ring *ring, size_t bytes) {
  ks_cuda_segment s;
  if (ring->n_segments > 0) {
    ks_cuda_segment *last = &ring->segments[ring->n_segments - 1];
    last->stamp = ring->total;
    KS_CUDA_TRY(ctx, "staging", cudaEventRecord(last->left, ks_cuda_of(ctx)->stream));
  }
  size_t cap = (size_t)ring->cap_segments;
  KS_TRY(
      ks_cuda_grow(&ring->segments, &cap, (size_t)ring->n_segments + 1, sizeof *ring->segments, "staging"));
  ring->cap_segments = (int)cap;
  KS_TRY(take_oldest(ctx, ring, bytes, &s));
  if (s.size == 0) KS_TRY(segment_make(ctx, ring, bytes, &s));
  s.used = 0;
  ring->segments[ring->n_segments++] = s;
  return KS_OK;
}

ks_status ks_cuda_ring_take(ks_ctx *ctx, ks_cuda_ring *ring, size_t bytes, void **host, void **device) {
  const size_t room = round_up(bytes);
  if (ring->n_segments == 0 ||
      ring->segments[ring->n_segments - 1].size - ring->segments[ring->n_segments - 1].used < room)
    KS_TRY(next_segment(ctx, ring, room));
  ks_cuda_segment *s = &ring->segments[ring->n_segments - 1];
  *host = s->host + s->used;
  *device = s->device ? s->device + s->used : NULL;
  s->used += room;
  ring->total += room;
  return KS_OK;
}

void ks_cuda_ring_free(ks_ctx *ctx, ks_cuda_ring *ring) {
  for (int i = 0; i < ring->n_segments; i++)
    segment_free(ctx, &ring->segments[i], ring->with_device);
  free(ring->segments);
  ring->segments = NULL;
  ring->n_segments = ring->cap_segments = 0;
}

ks_status ks_cuda_send(ks_ctx *ctx, const char *op, void *device, const void *host, size_t bytes) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  for (size_t done = 0; done < bytes;) {
    const size_t n = bytes - done < SEGMENT_BYTES ? bytes - done : SEGMENT_BYTES;
    void *pinned, *none;
    KS_TRY(ks_cuda_ring_take(ctx, &cuda->uploads, n, &pinned, &none));
    memcpy(pinned, (const char *)host + done, n);
    KS_CUDA_TRY(ctx, op,
                cudaMemcpyAsync((char *)device + done, pinned, n, cudaMemcpyHostToDevice, cuda->stream));
    done += n;
  }
  return KS_OK;
}

ks_status ks_cuda_stage(ks_ctx *ctx, const void *host, size_t bytes, const void **device) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  void *pinned, *to;
  *device = NULL;
  KS_TRY(ks_cuda_alive(ctx, "staging"));
  if (bytes == 0) return KS_OK;
  cuda->counts.stages++;
  if (ks_cuda_in_step(ctx)) return ks_cuda_step_stage(ctx, host, bytes, device);
  KS_TRY(ks_cuda_ring_take(ctx, &cuda->staging, bytes, &pinned, &to));
  memcpy(pinned, host, bytes);
  KS_CUDA_TRY(ctx, "staging", cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, cuda->stream));
  *device = to;
  return KS_OK;
}

/* ---------------------------------------------------------------- workspace */

ks_status ks_cuda_workspace(ks_ctx *ctx, size_t bytes, void **device) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  *device = NULL;
  KS_TRY(ks_cuda_alive(ctx, "workspace"));
  if (bytes > cuda->workspace_bytes) {
    const size_t wanted = (bytes + (SEGMENT_BYTES - 1)) & ~(size_t)(SEGMENT_BYTES - 1);
    KS_TRY(ks_cuda_step_flush(ctx)); /* what is held back may use the old one */
    KS_TRY(ks_cuda_activity_end(ctx));
    KS_CUDA_TRY(ctx, "workspace", cudaStreamSynchronize(cuda->stream));
    ks_cuda_activity_waited(ctx);
    cudaFree(cuda->workspace);
    ks_mem_account(ctx, 0, cuda->workspace_bytes);
    cuda->workspace = NULL;
    cuda->workspace_bytes = 0;
    KS_TRY(ks_cuda_alloc(ctx, "workspace", wanted, &cuda->workspace));
    cuda->workspace_bytes = wanted;
    ks_mem_account(ctx, wanted, 0);
  }
  *device = cuda->workspace;
  return KS_OK;
}

ks_status ks_cuda_counters(ks_ctx *ctx, unsigned **device) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  const size_t bytes = KS_CUDA_N_COUNTERS * sizeof **device;
  *device = NULL;
  KS_TRY(ks_cuda_alive(ctx, "counters"));
  if (!cuda->counters) {
    void *made;
    KS_TRY(ks_cuda_alloc(ctx, "counters", bytes, &made));
    cuda->counters = made;
    ks_mem_account(ctx, bytes, 0);
    KS_CUDA_TRY(ctx, "counters", cudaMemsetAsync(made, 0, bytes, cuda->stream));
  }
  *device = cuda->counters;
  return KS_OK;
}

/* ---------------------------------------------------------------- late outputs */

static ks_status late_room(ks_ctx *ctx, size_t bytes, void **pinned) {
  ks_cuda_late *late = &ks_cuda_of(ctx)->late;
  const size_t room = round_up(bytes);
  for (int i = 0; i < late->n_blocks; i++) {
    ks_cuda_late_block *b = &late->blocks[i];
    if (b->size - b->used < room) continue;
    *pinned = b->host + b->used;
    b->used += room;
    return KS_OK;
  }
  size_t cap = (size_t)late->cap_blocks;
  KS_TRY(ks_cuda_grow(&late->blocks, &cap, (size_t)late->n_blocks + 1, sizeof *late->blocks, "late outputs"));
  late->cap_blocks = (int)cap;
  const size_t size = room > LATE_BLOCK_BYTES ? room : LATE_BLOCK_BYTES;
  KS_CUDA_TRY(ctx, "late outputs", cudaHostAlloc(pinned, size, cudaHostAllocDefault));
  late->blocks[late->n_blocks++] = (ks_cuda_late_block){*pinned, size, room};
  return KS_OK;
}

ks_status ks_cuda_late_fetch(ks_ctx *ctx, const void *device, size_t bytes, void **pinned) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  KS_TRY(late_room(ctx, bytes, pinned));
  KS_TRY(ks_cuda_activity_end(ctx));
  KS_CUDA_TRY(ctx, "late outputs",
              cudaMemcpyAsync(*pinned, device, bytes, cudaMemcpyDeviceToHost, cuda->stream));
  return KS_OK;
}

ks_status ks_cuda_late_note(ks_ctx *ctx, void *host, const void *pinned, size_t bytes) {
  ks_cuda_late *late = &ks_cuda_of(ctx)->late;
  KS_TRY(ks_cuda_grow(&late->entries, &late->cap_entries, late->n_entries + 1, sizeof *late->entries,
                      "late outputs"));
  late->entries[late->n_entries++] = (ks_cuda_late_entry){host, pinned, bytes};
  late->pending_bytes += bytes;
  return KS_OK;
}

void ks_cuda_late_drop(ks_ctx *ctx) {
  ks_cuda_late *late = &ks_cuda_of(ctx)->late;
  late->n_entries = 0;
  late->pending_bytes = 0;
  for (int i = 0; i < late->n_blocks; i++)
    late->blocks[i].used = 0;
}

ks_status ks_cuda_deliver(ks_ctx *ctx, void *host, const void *device, size_t bytes) {
  void *pinned;
  KS_TRY(ks_cuda_alive(ctx, "late outputs"));
  if (bytes == 0) return KS_OK;
  if (ks_cuda_in_step(ctx)) return ks_cuda_step_deliver(ctx, host, device, bytes);
  if (ks_cuda_of(ctx)->late.pending_bytes > LATE_PENDING_BYTES) KS_TRY(ks_cuda_finish(ctx));
  KS_TRY(ks_cuda_late_fetch(ctx, device, bytes, &pinned));
  return ks_cuda_late_note(ctx, host, pinned, bytes);
}

ks_status ks_cuda_finish(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  if (ks_cuda_in_step(ctx)) return KS_FAIL(KS_EINTERNAL, "cuda: waiting for the device inside a step");
  ks_status status = ks_cuda_alive(ctx, "ks_sync");
  if (status == KS_OK) status = ks_cuda_activity_end(ctx);
  if (status == KS_OK) {
    cudaError_t e = cudaStreamSynchronize(cuda->stream);
    if (e != cudaSuccess) status = ks_cuda_failed(ctx, "ks_sync", "cudaStreamSynchronize", e);
  }
  if (status == KS_OK) ks_cuda_activity_waited(ctx);
  for (size_t i = 0; i < cuda->late.n_entries && status == KS_OK; i++) {
    const ks_cuda_late_entry *entry = &cuda->late.entries[i];
    memcpy(entry->host, entry->pinned, entry->bytes);
  }
  ks_cuda_late_drop(ctx);
  return status;
}

void ks_cuda_stage_exit(ks_ctx *ctx) {
  ks_cuda *cuda = ks_cuda_of(ctx);
  ks_cuda_ring_free(ctx, &cuda->uploads);
  ks_cuda_ring_free(ctx, &cuda->staging);
  for (int i = 0; i < cuda->late.n_blocks; i++)
    cudaFreeHost(cuda->late.blocks[i].host);
  free(cuda->late.blocks);
  free(cuda->late.entries);
  ks_mem_account(ctx, 0, cuda->workspace_bytes);
  cudaFree(cuda->workspace);
  if (cuda->counters) ks_mem_account(ctx, 0, KS_CUDA_N_COUNTERS * sizeof *cuda->counters);
  cudaFree(cuda->counters);
}
