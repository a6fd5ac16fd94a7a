/* llama2.c checkpoints written here: both layouts, the order of rotary pairs, damage. */
#include "core/model/checkpoint.h"
#include "tests/core/model/hostile.h"

static char path[] = "/tmp/ks_llama2c_XXXXXX";

static void make(void) {
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
}

static void clean(void) {
  unlink(path);
}

TestSuite(load_llama2c, .init = make, .fini = clean);

typedef struct {
  int32_t dim, hidden, layers, heads, kv_heads, vocab, seq;
} header;
static const header small = {12, 20, 2, 2, 1, 7, 5}; /* heads of 6 */

/* Each weight's value says where it is: kind, layer, place. */
static void put_tensor(ks_text *t, int kind, int layers, int n) {
  for (int l = 0; l < layers; l++)
    for (int i = 0; i < n; i++) {
      float v = (float)(kind * 100000 + l * 10000 + i);
      cr_assert_eq(ks_text_add(t, (const char *)&v, 4), KS_OK);
    }
}

enum { EMBEDDING = 1, ATTN_NORM, Q, K, V, O, MLP_NORM, W1, W2, W3, FINAL_NORM, ROTARY, HEAD };

static void put_matrices(ks_text *t, const header *h) {
  int kv = h->dim / h->heads * h->kv_heads;
  put_tensor(t, Q, h->layers, h->dim * h->dim);
  put_tensor(t, K, h->layers, kv * h->dim);
  put_tensor(t, V, h->layers, kv * h->dim);
  put_tensor(t, O, h->layers, h->dim * h->dim);
}

static ks_text legacy(const header *h, bool tied) {
  ks_text t = {0};
  header signed_vocab = *h;
  if (!tied) signed_vocab.vocab = -h->vocab;
  cr_assert_eq(ks_text_add(&t, (const char *)&signed_vocab, sizeof signed_vocab), KS_OK);
  put_tensor(&t, EMBEDDING, 1, h->vocab * h->dim);
  put_tensor(&t, ATTN_NORM, h->layers, h->dim);
  put_matrices(&t, h);
  put_tensor(&t, MLP_NORM, h->layers, h->dim);
  put_tensor(&t, W1, h->layers, h->hidden * h->dim);
  put_tensor(&t, W2, h->layers, h->dim * h->hidden);
  put_tensor(&t, W3, h->layers, h->hidden * h->dim);
  put_tensor(&t, FINAL_NORM, 1, h->dim);
  put_tensor(&t, ROTARY, 2, h->seq * h->dim / h->heads / 2);
  if (!tied) put_tensor(&t, HEAD, 1, h->vocab * h->dim);
  return t;
}

static ks_text version1(const header *h, bool tied, int32_t version) {
  ks_text t = {0};
  const uint32_t magic = 0x616b3432;
  char zeros[256] = {0};
  cr_assert_eq(ks_text_add(&t, (const char *)&magic, 4), KS_OK);
  cr_assert_eq(ks_text_add(&t, (const char *)&version, 4), KS_OK);
  cr_assert_eq(ks_text_add(&t, (const char *)h, sizeof *h), KS_OK);
  cr_assert_eq(ks_text_add(&t, &(char){(char)tied}, 1), KS_OK);
  cr_assert_eq(ks_text_add(&t, zeros, 256 - t.len), KS_OK);
  put_tensor(&t, ATTN_NORM, h->layers, h->dim);
  put_tensor(&t, MLP_NORM, h->layers, h->dim);
  put_tensor(&t, FINAL_NORM, 1, h->dim);
  put_tensor(&t, EMBEDDING, 1, h->vocab * h->dim);
  put_matrices(&t, h);
  put_tensor(&t, W1, h->layers, h->hidden * h->dim);
  put_tensor(&t, W2, h->layers, h->dim * h->hidden);
  put_tensor(&t, W3, h->layers, h->hidden * h->dim);
  if (!tied) put_tensor(&t, HEAD, 1, h->vocab * h->dim);
  return t;
}

static void check_place(const ks_tensor *t, int kind, int layer, int64_t n_out, int64_t n_in) {
  cr_assert(t->data, "kind %d is not there", kind);
  cr_expect_eq(t->n_out, n_out, "kind %d", kind);
  cr_expect_eq(t->n_in, n_in, "kind %d", kind);
  float first, last;
  memcpy(&first, t->data, 4);
  memcpy(&last, t->data + 4 * (n_out * n_in - 1), 4);
  cr_expect_eq(first, (float)(kind * 100000 + layer * 10000), "kind %d, layer %d: %g", kind, layer,
               (double)first);
  cr_expect_eq(last, (float)(kind * 100000 + layer * 10000 + n_out * n_in - 1), "kind %d, layer %d", kind,
               layer);
}

static void check_all(const header *h, bool tied, const char *format) {
  static const int kinds[KS_N_TARGETS] = {Q, K, V, O, W1, W3, W2};
  ks_checkpoint c;
  cr_assert_eq(ks_checkpoint_open(path, &c), KS_OK, "%s", ks_error_message());
  cr_expect_str_eq(c.format, format);
  cr_expect(c.interleaved);
  cr_expect_eq(c.config.tied_head, tied);
  cr_expect_eq(c.config.max_seq_len, h->seq);
  cr_expect_eq(c.config.head_dim, h->dim / h->heads);
  cr_expect_eq(c.config.rms_eps, 1e-5f);
  check_place(&c.embedding, EMBEDDING, 0, h->vocab, h->dim);
  check_place(&c.final_norm, FINAL_NORM, 0, h->dim, 1);
  if (tied)
    cr_expect_null(c.head.data);
  else
    check_place(&c.head, HEAD, 0, h->vocab, h->dim);
  for (int l = 0; l < h->layers; l++) {
    check_place(&c.layers[l].attn_norm, ATTN_NORM, l, h->dim, 1);
    check_place(&c.layers[l].mlp_norm, MLP_NORM, l, h->dim, 1);
    for (int t = 0; t < KS_N_TARGETS; t++) {
      int64_t n_out, n_in;
      ks_target_shape(&c.config, (ks_target)t, &n_out, &n_in);
      check_place(&c.layers[l].linear[t], kinds[t], l, n_out, n_in);
    }
  }
  ks_checkpoint_close(&c);
}

static void put(ks_text *t) {
  hostile_write(path, t->data, t->len);
  ks_text_free(t);
}

Test(load_llama2c, every_tensor_in_its_place) {
  for (int tied = 0; tied < 2; tied++) {
    ks_text t = legacy(&small, tied);
    put(&t);
    check_all(&small, tied, "llama2.c");
    t = version1(&small, tied, 1);
    put(&t);
    check_all(&small, tied, "llama2.c v1");
  }
}

/* What q, k and v compute from unit vectors are their columns: rows of q and k must come as halves, those of
 * v as they were. */
Test(load_llama2c, rotary_pairs_become_halves) {
  ks_text t = legacy(&small, true);
  put(&t);
  ks_ctx *ctx;
  ks_model *m;
  const int64_t dim = small.dim, head_dim = dim / small.heads;
  cr_assert_eq(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 1}), KS_OK);
  cr_assert_eq(ks_model_load(ctx, path, &KS_MODEL_LOAD_DEFAULT, &m), KS_OK, "%s", ks_error_message());
  float *unit = calloc((size_t)(dim * dim), sizeof *unit), *y = malloc((size_t)(dim * dim) * sizeof *y);
  void *dx, *dy;
  for (int64_t i = 0; i < dim; i++)
    unit[i * dim + i] = 1;
  cr_assert_eq(ks_mem_alloc(ctx, (size_t)(dim * dim) * 4, &dx), KS_OK);
  cr_assert_eq(ks_mem_alloc(ctx, (size_t)(dim * dim) * 4, &dy), KS_OK);
  cr_assert_eq(ks_mem_upload(ctx, dx, unit, (size_t)(dim * dim) * 4), KS_OK);
  static const int kinds[] = {Q, K, V};
  for (int target = 0; target < 3; target++) {
    const ks_weight *w = m->layers[1].linear[target];
    int64_t n_out = ks_weight_n_out(w);
    cr_assert_eq(ks_linear_forward(ctx, &(ks_linear_args){.w = w, .x = dx, .y = dy, .n_rows = dim}), KS_OK,
                 "%s", ks_error_message());
    cr_assert_eq(ks_mem_download(ctx, y, dy, (size_t)(dim * n_out) * 4), KS_OK);
    for (int64_t o = 0; o < n_out; o++) {
      int64_t head = o / head_dim, j = o % head_dim, half = head_dim / 2;
      int64_t from = target == 2 ? o : head * head_dim + (j < half ? 2 * j : 2 * (j - half) + 1);
      for (int64_t i = 0; i < dim; i++)
        cr_assert_eq(y[i * n_out + o], (float)(kinds[target] * 100000 + 10000 + from * dim + i),
                     "target %d, row %lld", target, (long long)o);
    }
  }
  ks_mem_free(ctx, dx);
  ks_mem_free(ctx, dy);
  free(unit);
  free(y);
  cr_expect_eq(m->n_params, 7 * 12 + 12 + 2 * (2 * 12 + 2 * 144 + 2 * 72 + 3 * 240));
  ks_model_destroy(m);
  ks_ctx_destroy(ctx);
}

/* ---------------------------------------------------------------- damage */

static ks_status open_file(const char *name) {
  ks_checkpoint c;
  ks_status s = ks_checkpoint_open(name, &c);
  if (s == KS_OK) {
    char hex[65];
    ks_checkpoint_hash(&c, hex);
  }
  ks_checkpoint_close(&c);
  return s;
}

Test(load_llama2c, damaged) {
  size_t before = ks_process_peak_bytes();
  for (int layout = 0; layout < 3; layout++) {
    ks_text t = layout == 0   ? legacy(&small, true)
                : layout == 1 ? legacy(&small, false)
                              : version1(&small, true, 1);
    size_t n_header = layout == 2 ? 256 : 28;
    hostile h = {.path = path, .load_path = path, .load = open_file};
    hostile_try(&h, t.data, t.len, "whole", t.len);
    cr_assert_eq(h.n_loaded, 1, "%s", ks_error_message());
    hostile_truncate(&h, t.data, t.len, n_header + 32, 200);
    cr_expect_eq(h.n_loaded, 1, "a cut file was taken for a whole one");
    hostile_mutate(&h, t.data, t.len, n_header, 1500);
    cr_expect_gt(h.n_refused, 500);
    cr_assert_eq(ks_text_add(&t, "\0\0\0\0", 4), KS_OK);
    hostile_write(path, t.data, t.len);
    cr_expect_eq(open_file(path), KS_EDATA, "bytes behind the end");
    ks_text_free(&t);
  }
  hostile_limit_memory(before, 64);
}

Test(load_llama2c, hostile_headers) {
  static const struct {
    header h;
    const char *says;
  } cases[] = {
      {{0, 20, 2, 2, 1, 7, 5}, "dim is 0"},
      {{12, -1, 2, 2, 1, 7, 5}, "hidden_dim is -1"},
      {{12, 20, 0, 2, 1, 7, 5}, "n_layers is 0"},
      {{12, 20, 2, 0, 1, 7, 5}, "n_heads is 0"},
      {{12, 20, 2, 2, 0, 7, 5}, "n_kv_heads is 0"},
      {{12, 20, 2, 2, 1, 0, 5}, "vocab_size is 0"},
      {{12, 20, 2, 2, 1, INT32_MIN, 5}, "vocab_size is 0"},
      {{12, 20, 2, 2, 1, 7, -5}, "max_seq_len is -5"},
      {{12, 20, 2, 5, 1, 7, 5}, "no multiple of n_heads"},
      {{12, 20, 2, 4, 3, 7, 5}, "n_kv_heads"},
      {{12, 20, 2, 4, 1, 7, 5}, "odd"},
      {{INT32_MAX - 1, INT32_MAX, INT32_MAX, 1, 1, INT32_MAX, INT32_MAX}, "overflow"},
      {{65536, 65536, 1000, 1, 1, 65536, 65536}, "complete"},
      {{12, 20, INT32_MAX, 2, 1, 7, 5}, "layers"},
      {{12, 20, 1000, 2, 1, 7, 5}, "layers"},
      {{12, 20, 2, 2, 1, 7, INT32_MAX}, "rotary"},
      {{12, 20, 2, 2, 1, INT32_MAX, 5}, "embedding"},
      {{12, 21, 2, 2, 1, 7, 5}, "file's end"},
      {{12, 19, 2, 2, 1, 7, 5}, "follow the last weight"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    ks_text t = legacy(&small, true);
    memcpy(t.data, &cases[i].h, sizeof cases[i].h);
    put(&t);
    ks_status s = open_file(path);
    cr_expect_eq(s, KS_EDATA, "case %zu: %s: %s", i, ks_status_name(s), ks_error_message());
    cr_expect(strstr(ks_error_message(), cases[i].says) && strstr(ks_error_message(), path), "case %zu: %s",
              i, ks_error_message());
  }
}

Test(load_llama2c, other_files_are_named) {
  static const struct {
    const char *bytes;
    ks_status status;
    const char *says;
  } cases[] = {{"", KS_EDATA, "too few"},
               {"GGUF                            ", KS_EUNSUPPORTED, "GGUF"},
               {"PK\3\4                            ", KS_EUNSUPPORTED, "PyTorch"}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    hostile_write(path, cases[i].bytes, strlen(cases[i].bytes));
    cr_expect_eq(open_file(path), cases[i].status);
    cr_expect(strstr(ks_error_message(), cases[i].says), "%s", ks_error_message());
  }
  ks_text t = version1(&small, true, 2);
  put(&t);
  cr_expect_eq(open_file(path), KS_EUNSUPPORTED);
  cr_expect(strstr(ks_error_message(), "version 2"), "%s", ks_error_message());
  char safetensors[64] = {40};
  memset(safetensors + 8, '{', 40);
  hostile_write(path, safetensors, sizeof safetensors);
  cr_expect_eq(open_file(path), KS_EDATA);
  cr_expect(strstr(ks_error_message(), "folder"), "%s", ks_error_message());
  unlink(path);
  cr_expect_eq(open_file(path), KS_EDATA);
}

/* ---------------------------------------------------------------- configuration, random models */

Test(load_llama2c, random_model) {
  ks_ctx *ctx;
  ks_model *a, *b, *other;
  ks_model_config c = {.n_layers = 2,
                       .hidden_size = 16,
                       .intermediate_size = 24,
                       .vocab_size = 10,
                       .max_seq_len = 8,
                       .n_heads = 2,
                       .n_kv_heads = 1,
                       .head_dim = 8,
                       .rms_eps = 1e-5f,
                       .rope_theta = 1e4,
                       .bos_id = -1,
                       .qkv_bias = true,
                       .qk_norm = true};
  cr_assert_eq(ks_ctx_create(&ctx, &(ks_ctx_params){.backend = "cpu", .n_threads = 2}), KS_OK);
  cr_assert_eq(ks_model_create_random(ctx, &c, KS_DTYPE_F32, 7, &a), KS_OK, "%s", ks_error_message());
  cr_assert_eq(ks_model_create_random(ctx, &c, KS_DTYPE_F32, 7, &b), KS_OK);
  cr_assert_eq(ks_model_create_random(ctx, &c, KS_DTYPE_F32, 8, &other), KS_OK);
  float rows[3][160];
  void *y;
  int32_t tokens[10] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  ks_model *models[3] = {a, b, other};
  cr_assert_eq(ks_mem_alloc(ctx, sizeof rows[0], &y), KS_OK);
  for (int i = 0; i < 3; i++) {
    cr_assert_eq(ks_embed_forward(ctx, &(ks_embed_args){models[i]->embedding, tokens, y, 10, NULL}), KS_OK);
    cr_assert_eq(ks_mem_download(ctx, rows[i], y, sizeof rows[0]), KS_OK);
  }
  cr_expect_eq(memcmp(rows[0], rows[1], sizeof rows[0]), 0, "one seed, one model");
  cr_expect_neq(memcmp(rows[0], rows[2], sizeof rows[0]), 0);
  cr_expect_str_eq(a->sha256, b->sha256);
  cr_expect_str_neq(a->sha256, other->sha256);
  double sum = 0, squares = 0;
  for (int i = 0; i < 160; i++) {
    sum += (double)rows[0][i];
    squares += (double)(rows[0][i] * rows[0][i]);
  }
  /* Five standard deviations of the mean and of the variance of 160 draws. */
  cr_expect_lt(sum * sum, 25.0 * 160 * 0.02 * 0.02);
  cr_expect(squares / 160 > 0.0004 * (1 - 5 * 0.112) && squares / 160 < 0.0004 * (1 + 5 * 0.112));
  cr_expect_not_null(a->layers[1].q_norm);
  cr_expect_eq(a->n_params, 2 * 160 + 16 + 2 * (2 * 256 + 2 * 128 + 3 * 384 + 32 + 2 * 16 + 2 * 8));
  ks_mem_free(ctx, y);
  ks_model_destroy(b);
  ks_model_destroy(other);
  /* Quickly: the same distribution, every matrix from another place on. */
  const ks_dtype types[2] = {KS_DTYPE_F32, KS_DTYPE_BF16};
  for (int i = 0; i < 2; i++) {
    cr_assert_eq(ks_mem_alloc(ctx, sizeof rows[0], &y), KS_OK);
    cr_assert_eq(ks_model_create_random_quickly(ctx, &c, types[i], 7, &b), KS_OK, "%s", ks_error_message());
    cr_expect_str_neq(a->sha256, b->sha256);
    cr_expect_eq(a->n_params, b->n_params);
    const ks_weight *matrices[2] = {b->embedding, b->head};
    for (int k = 0; k < 2; k++) {
      cr_assert_eq(ks_embed_forward(ctx, &(ks_embed_args){matrices[k], tokens, y, 10, NULL}), KS_OK);
      cr_assert_eq(ks_mem_download(ctx, rows[k], y, sizeof rows[k]), KS_OK);
      squares = 0;
      for (int j = 0; j < 160; j++)
        squares += (double)(rows[k][j] * rows[k][j]);
      cr_expect(squares / 160 > 0.0004 * (1 - 5 * 0.112) && squares / 160 < 0.0004 * (1 + 5 * 0.112));
    }
    cr_expect_neq(memcmp(rows[0], rows[1], sizeof rows[0]), 0);
    ks_mem_free(ctx, y);
    ks_model_destroy(b);
  }
  ks_model_destroy(a);
  c.n_heads = 3;
  c.n_kv_heads = 2;
  cr_expect_eq(ks_model_create_random(ctx, &c, KS_DTYPE_F32, 7, &a), KS_EDATA);
  cr_expect_null(a);
  ks_ctx_destroy(ctx);
}
