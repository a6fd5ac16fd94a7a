"""Peers of the cases on single operations, for bench_peers.py."""
from bench_peers import Skipped, Wrong, shared


class Op:
    """step() keeps its result in `out`; check() compares it; graphable: may be captured in a CUDA graph."""

    def __init__(self, fn, check, graphable=True):
        self.fn, self.checked, self.out, self.graphable = fn, check, None, graphable

    def step(self):
        self.out = self.fn()

    def check(self):
        self.step()
        return self.checked(self.out)

    def after(self):
        self.step()
        self.checked(self.out)
        return ""


def near(got, exact, plain, what):
    """As near to float32 as twice what the same formula in the case's own type is, and one unit in the last place of bf16."""
    if got.shape != exact.shape:
        raise Wrong("%s has shape %s" % (what, tuple(got.shape)))
    exact = exact.float()
    error, own = float((got.float() - exact).abs().max()), float((plain.float() - exact).abs().max())
    limit = 2 * own + 2.0**-8 * float(exact.abs().max())
    if not error <= limit:
        raise Wrong("%s is %.3g from float32, twice its own type's error is %.3g" % (what, error, limit))


def randn(env, *shape, dtype=None):
    return env.torch.randn(*shape, device=env.device, dtype=dtype or env.dtype)


def twice(env, fn, make):
    """torch_eager and torch_compiled of fn: make(fn) -> Op."""
    return [("torch_eager", lambda: make(fn), True), ("torch_compiled", lambda: make(env.compile(fn)), True)]


# ---------------------------------------------------------------- attention


def plain_attention(torch, q, k, v):
    """[heads, T, d] each, causal, in q's type."""
    t, d = q.shape[-2:]
    s = q @ k.transpose(-1, -2) / d**0.5
    s = s.masked_fill(torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return s.softmax(-1) @ v


class Attention:
    """Packed sequences [n, T, heads, d], as a model has them. The first sequence's first group of heads is checked."""

    def __init__(self, env, p, backend, backward):
        self.graphable = not backward  # autograd's stream is that of the forward pass, which is not captured
        torch = self.torch = env.torch
        n, t, h, kv, d = p["rows"] // p["seq_len"], p["seq_len"], p["n_heads"], p["n_kv_heads"], p["head_dim"]
        self.group, self.backend, self.backward, self.gqa = h // kv, backend, backward, h != kv
        self.q, self.k, self.v, self.dy = (randn(env, n, t, heads, d).transpose(1, 2) for heads in (h, kv, kv, h))
        self.out = self.grads = None
        if backward:
            for x in (self.q, self.k, self.v):
                x.requires_grad_()
            self.out = self.forward()

    def forward(self):
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self.backend):
            return self.torch.nn.functional.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=self.gqa)

    def step(self):
        if self.backward:
            self.grads = self.torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dy, retain_graph=True)
        else:
            with self.torch.no_grad():
                self.out = self.forward()

    def reference(self, dtype):
        torch, g = self.torch, self.group
        with torch.enable_grad():
            q, k, v, dy = (x.detach()[0, :n].to(dtype).requires_grad_() for x, n in ((self.q, g), (self.k, 1), (self.v, 1), (self.dy, g)))
            y = plain_attention(torch, q, k, v)
            return (y.detach(),) if not self.backward else torch.autograd.grad(y, (q, k, v), dy.detach())

    def check(self):
        self.step()
        exact, plain = self.reference(self.torch.float32), self.reference(self.q.dtype)
        got = [x[0, :n] for x, n in zip(self.grads, (self.group, 1, 1))] if self.backward else [self.out.detach()[0, :self.group]]
        for g, e, p, what in zip(got, exact, plain, ("dq", "dk", "dv") if self.backward else ("the result",)):
            near(g, e, p, what)
        return ""

    def after(self):
        return self.check()


def attention(env, case):
    """FlashAttention-2 is PyTorch's own copy of it (SDPBackend.FLASH_ATTENTION), which pads head sizes as the package does."""
    from torch.nn.attention import SDPBackend

    backward = case["op"].endswith("backward")
    make = lambda backend: lambda: Attention(env, case["parameters"], backend, backward)
    return [("flash_attention_2", make(SDPBackend.FLASH_ATTENTION), True), ("cudnn", make(SDPBackend.CUDNN_ATTENTION), True)]


# ---------------------------------------------------------------- head


def head_loss(env, case):
    p, torch, f = case["parameters"], env.torch, env.torch.nn.functional
    data = shared(lambda: (randn(env, p["n_out"], p["n_cols"]) * 0.02, randn(env, p["rows"], p["n_cols"]),
                           torch.randint(p["n_out"], (p["rows"],), device=env.device)))

    def losses(h, w, t):
        return f.cross_entropy(f.linear(h, w).float(), t, reduction="none")

    def gradient(fn):
        def both(h, w, t):
            h = h.detach().requires_grad_()
            loss = fn(h, w, t)
            return loss.detach(), torch.autograd.grad(loss.sum(), h)[0]

        def alone(h, w, t):
            with torch.no_grad():
                return fn(h, w, t), None

        return both if p["gradient"] else alone

    def check(out):
        (w, x, targets), n = data(), min(64, p["rows"])
        reference = []
        for dtype in (torch.float32, env.dtype):
            h = x[:n].detach().to(dtype).requires_grad_()
            loss = f.cross_entropy(f.linear(h, w.to(dtype)), targets[:n], reduction="none")
            reference.append((loss.detach(), torch.autograd.grad(loss.sum(), h)[0]))
        near(out[0][:n], reference[0][0], reference[1][0], "the loss")
        if p["gradient"]:
            near(out[1][:n], reference[0][1], reference[1][1], "dx")
        return ""

    def make(fn, chunk=None):
        fn, (w, x, targets) = gradient(fn), data()
        if chunk is None:
            return Op(lambda: fn(x, w, targets), check)

        def chunks():
            parts = [fn(h, w, t) for h, t in zip(x.split(chunk), targets.split(chunk))]
            return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]) if p["gradient"] else None

        return Op(chunks, check)

    return [("torch_eager", lambda: make(losses), True), ("torch_compiled", lambda: make(env.compile(losses)), True),
            ("torch_chunked", lambda: make(env.compile(losses), min(1024, p["rows"])), True)]


# ---------------------------------------------------------------- similarity


def check_top(env, q, k, best_k, scores, index):
    """Each found key has its own score, and none that is left out of a few queries is larger than the last."""
    torch = env.torch
    if tuple(scores.shape) != (q.shape[0], best_k) or int(index.min()) < 0 or int(index.max()) >= k.shape[0]:
        raise Wrong("a result of shape %s" % (tuple(scores.shape),))
    some = torch.linspace(0, q.shape[0] - 1, min(4, q.shape[0]), device=env.device).long()
    exact = q[some].float() @ k.float().T
    plain = (q[some] @ k.T).float()
    own = 2 * float((plain - exact).abs().max()) + 2.0**-8 * float(exact.abs().max())
    best = exact.topk(best_k).values
    found = exact.gather(1, index[some].long())
    for got, what in ((scores[some].float(), "a score"), (found.sort(descending=True).values, "a found key's score")):
        error = float((got - best).abs().max())
        if not error <= own:
            raise Wrong("%s is %.3g from that at its rank, twice bf16's error is %.3g" % (what, error, own))
    return ""


def faiss_search(env, q, k, best_k, dtype):
    """Brute force over vectors on the GPU: knn_gpu where it takes the type, else an index that keeps float16."""
    try:
        import faiss
        import faiss.contrib.torch_utils  # noqa: F401  # lets faiss take tensors
    except Exception as e:  # pylint: disable=broad-except  # not installed, or its libraries are not
        raise Skipped("faiss cannot be imported: %s" % (str(e).splitlines() or [""])[0]) from e
    if not hasattr(faiss, "StandardGpuResources"):
        raise Skipped("this faiss is without GPU")
    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    if dtype == "f16_index":
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        index = faiss.GpuIndexFlatIP(resources, k.shape[1], config)
        for part in k.split(1 << 17):
            index.add(part.float().contiguous())
        queries = q.float().contiguous()
        return lambda: index.search(queries, best_k)
    wanted = {"bf16": env.torch.bfloat16, "f16": env.torch.float16, "f32": env.torch.float32}[dtype]
    queries, keys = q.to(wanted).contiguous(), k.to(wanted).contiguous()
    return lambda: faiss.knn_gpu(resources, queries, keys, best_k, metric=faiss.METRIC_INNER_PRODUCT)


def similarity(env, case):
    p, op = case["parameters"], case["op"]

    def vectors():
        q, k = randn(env, p["rows"], p["n_cols"]), env.torch.empty(p["n_keys"], p["n_cols"], device=env.device, dtype=env.dtype)
        for part in k.split(1 << 17):
            part.normal_()
        return q, k

    data, n = shared(vectors), min(8, p["rows"])

    def make(fn, reduce=None, what="the matrix"):
        q, k = data()
        if reduce is None:
            return Op(lambda: fn(q, k), lambda out: check_top(env, q, k, p["best_k"], *out))
        return Op(lambda: fn(q, k), lambda out: near(out[:n], reduce(q[:n].float() @ k.float().T), reduce(q[:n] @ k.T), what))

    if op == "similarity":
        return [("torch_matmul", lambda: make(lambda q, k: q @ k.T, lambda s: s), True)]
    if op == "similarity_mean":
        return [("torch_matmul", lambda: make(lambda q, k: (q @ k.T).float().mean(1), lambda s: s.mean(1), "the mean"), True)]
    best_k = p["best_k"]
    peers = [("torch_topk", lambda: make(lambda q, k: tuple((q @ k.T).topk(best_k))), True)]
    if case["name"].startswith(("sim_many", "sim_one")):
        for dtype in ("bf16", "f16", "f16_index", "f32"):
            peers.append(("faiss." + dtype, lambda dtype=dtype: faiss_op(env, *data(), best_k, dtype), True))
    return peers


def faiss_op(env, q, k, best_k, dtype):
    return Op(faiss_search(env, q, k, best_k, dtype), lambda out: check_top(env, q, k, best_k, *out), graphable=False)


# ---------------------------------------------------------------- element-wise operations, optimizer


def backward_op(env, fn, inputs, dy, names):
    """An Op of the gradients of fn at inputs; fn is traced once, as a model would."""
    torch = env.torch
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = fn(*inputs)

    def reference(dtype):
        some = [x.detach()[:8].to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(reference.fn(*some), some, dy[:8].to(dtype))

    def check(out):
        for got, exact, plain, name in zip(out, reference(torch.float32), reference(env.dtype), names):
            near(got[:8], exact, plain, name)
        return ""

    op = Op(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), check, graphable=False)
    return op, reference


def elementwise(env, case):
    p, torch, f = case["parameters"], env.torch, env.torch.nn.functional
    rows, cols = p["rows"], p["n_cols"]
    if case["op"].startswith("rmsnorm"):
        weight = {dtype: torch.ones(cols, device=env.device, dtype=dtype) for dtype in (torch.float32, env.dtype)}
        fn, n_inputs = (lambda x: f.rms_norm(x, (cols,), weight[x.dtype], 1e-6)), 1
    else:
        fn, n_inputs = (lambda g, u: f.silu(g) * u), 2
    data = shared(lambda: [randn(env, rows, cols) for _ in range(n_inputs + 1)])
    if case["op"].endswith("backward"):

        def make(g):
            op, reference = backward_op(env, g, data()[:-1], data()[-1], ("dx", "the second gradient"))
            reference.fn = fn
            return op

        return twice(env, fn, make)

    def check(out):
        some = [x[:8] for x in data()[:-1]]
        near(out[:8], fn(*[x.float() for x in some]), fn(*some), "the result")
        return ""

    def make(g):
        def call():
            with torch.no_grad():
                return g(*data()[:-1])

        return Op(call, check)

    return twice(env, fn, make)


def rope(env, case):
    p, torch = case["parameters"], env.torch
    rows, h, d = p["rows"], p["n_heads"], p["head_dim"]

    def make_data():
        angle = torch.arange(rows, device=env.device)[:, None] * (1e4 ** (-torch.arange(0, d, 2, device=env.device) / d))[None]
        return (randn(env, rows, h, d), *(torch.cat((a, a), -1)[:, None].to(env.dtype) for a in (angle.cos(), angle.sin())))

    data = shared(make_data)

    def turn(x, cos, sin):  # as transformers writes it
        half = torch.cat((-x[..., d // 2:], x[..., :d // 2]), -1)
        return x * cos + half * sin

    def check(out):
        some = [x[-8:] for x in data()]
        near(out[-8:], turn(*[x.float() for x in some]), turn(*some), "the result")
        return ""

    return twice(env, turn, lambda fn: Op(lambda: fn(*data()), check))


def entropy(env, case):
    p, torch = case["parameters"], env.torch
    data, bins = shared(lambda: randn(env, p["rows"], p["n_cols"], dtype=torch.float32)), 100

    def softmax(x):
        logp = x.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1) / 0.6931471805599453

    def histogram(x):
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        at = ((x - low) / (high - low) * bins).long().clamp_(max=bins - 1)
        counts = torch.zeros(x.shape[0], bins, device=x.device, dtype=x.dtype).scatter_add_(1, at, torch.ones_like(x))
        q = counts / x.shape[1]
        return -torch.where(q > 0, q * q.log2(), 0.0).sum(-1)

    fn = softmax if p["kind"] == "softmax" else histogram

    def check(out):
        near(out[:8], fn(data()[:8].double()), fn(data()[:8]), "the entropy")
        return ""

    return twice(env, fn, lambda g: Op(lambda: g(data()), check))


def pool(env, case):
    p = case["parameters"]
    data = shared(lambda: randn(env, p["rows"] // p["seq_len"], p["seq_len"], p["n_cols"]))
    fn = lambda x: x.float().mean(1)
    check = lambda out: near(out, data().double().mean(1), data().mean(1), "the mean") or ""
    return twice(env, fn, lambda g: Op(lambda: g(data()), check))


class AdamW:
    """clip_grad_norm_ and AdamW(fused) of each adapter."""

    graphable = False

    def __init__(self, env, p):
        self.torch = torch = env.torch
        self.parameters = [torch.randn(p["n_cols"], device=env.device).requires_grad_() for _ in range(p["n_adapters"])]
        for q in self.parameters:
            q.grad = torch.randn_like(q)
        self.optimizers = [torch.optim.AdamW([q], lr=1e-3, weight_decay=0.01, fused=env.cuda) for q in self.parameters]
        self.norms = []

    def step(self):
        self.norms = []
        for q, optimizer in zip(self.parameters, self.optimizers):
            self.norms.append(self.torch.nn.utils.clip_grad_norm_([q], 1.0))
            optimizer.step()

    def check(self):
        before = self.parameters[0].detach().clone()
        g = self.parameters[0].grad.detach().clone()
        self.step()
        norm = float(g.double().norm())
        if not abs(float(self.norms[0]) - norm) <= 1e-4 * norm:
            raise Wrong("gradient norm %g, of float64 %g" % (float(self.norms[0]), norm))
        g = g.double() / max(norm, 1.0)
        expected = before.double() * (1 - 1e-5) - 1e-3 * g / (g.abs() + 1e-8)  # the first step: m / sqrt(v) is the sign, but for eps
        near(self.parameters[0].detach(), expected, expected, "the parameters")
        return ""


def adamw(env, case):
    return [("torch_fused", lambda: AdamW(env, case["parameters"]), True)]


MAKERS = {"attention_forward": attention, "attention_backward": attention, "head_loss": head_loss, "similarity": similarity,
          "similarity_top": similarity, "similarity_mean": similarity, "rmsnorm_forward": elementwise, "rmsnorm_backward": elementwise,
          "swiglu_forward": elementwise, "swiglu_backward": elementwise, "rope": rope, "entropy": entropy, "pool": pool, "adamw": adamw}
