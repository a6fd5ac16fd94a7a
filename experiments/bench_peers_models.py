"""Peers of the cases on whole models, for bench_peers.py: transformers' Llama with random bf16 weights, adapters by PEFT."""
from bench_peers import TARGETS, Skipped, Wrong, shared

LR, ALPHA = 1e-3, 16


def libraries(*names):
    try:
        return [__import__(n) for n in names]
    except ImportError as e:
        raise Skipped("%s cannot be imported: %s" % (" or ".join(names), e)) from e


def base_model(env, shape):
    (transformers,) = libraries("transformers")
    with env.device:
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**env.config(shape)), dtype=env.dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def with_adapters(env, p, n):
    """A PEFT model with n adapters a0..., of which a0 is active."""
    (peft,) = libraries("peft")
    config = lambda: peft.LoraConfig(r=p["rank"], lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=[TARGETS[t] for t in p["targets"].split(",")])
    with env.device:
        model = peft.get_peft_model(base_model(env, p["shape"]), config(), adapter_name="a0", autocast_adapter_dtype=False)
        for i in range(1, n):
            model.add_adapter("a%d" % i, config(), autocast_adapter_dtype=False)
    return model


def random_tokens(env, p, n, length):
    vocab = env.config(p["shape"])["vocab_size"]
    return env.torch.randint(vocab, (n, length), device=env.device)


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class ByLayers:
    """A model whose layers are compiled, all to the same code, and only when it is called through this: some seconds instead of
    minutes, at nearly the speed. Cases with a goal against a compiled peer compile the whole model instead."""

    def __init__(self, env, model):
        if not env.compiles:
            raise Skipped("not compiled: --no-compile")
        self.model = model
        self.layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        if not self.layers:
            raise Skipped("no LlamaDecoderLayer to compile")
        self.compiled = []
        for layer in self.layers:
            layer.compile(dynamic=False)
            self.compiled.append(layer._compiled_call_impl)
        self.switch(False)

    def switch(self, on):
        for layer, compiled in zip(self.layers, self.compiled):
            layer._compiled_call_impl = compiled if on else None

    def __call__(self, **arguments):
        self.switch(True)
        try:
            return self.model(**arguments)
        finally:
            self.switch(False)


# ---------------------------------------------------------------- training


class Trained:
    """A PEFT model in training, shared by the peers of a case; restart() puts the adapters back to their beginning."""

    def __init__(self, env, p, n_adapters, checkpointing=False):
        self.env, self.p = env, p
        self.model = with_adapters(env, p, n_adapters).train()
        if checkpointing:  # for good: switched on and off it would change what the other peers do, and compile them anew
            self.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.tokens = random_tokens(env, p, p["n_seqs"], p["seq_len"])
        self.parameters = {"a%d" % i: [q for n, q in self.model.named_parameters() if ".a%d." % i in n] for i in range(n_adapters)}
        if not all(self.parameters.values()):
            raise Wrong("an adapter without parameters")
        self.first = {k: [q.detach().clone() for q in v] for k, v in self.parameters.items()}

    def restart(self):
        with self.env.torch.no_grad():
            for name, kept in self.first.items():
                for q, k in zip(self.parameters[name], kept):
                    q.copy_(k)


class LoraStep:
    """forward, loss, backward, clipping, AdamW. One adapter after another with its share of the sequences."""

    def __init__(self, trained, call=None):
        self.t, self.env = trained, trained.env
        self.call = trained.model if call is None else call
        fused = self.env.cuda
        self.optimizers = {k: self.env.torch.optim.AdamW(v, lr=LR, weight_decay=0.01, fused=fused) for k, v in trained.parameters.items()}
        share = trained.tokens.shape[0] // len(self.optimizers)
        self.parts = {k: trained.tokens[i * share:(i + 1) * share] for i, k in enumerate(self.optimizers)}
        self.losses, self.norms, self.first_loss = [], [], None

    def step(self):
        torch, model = self.env.torch, self.t.model
        self.losses, self.norms = [], []
        for name, optimizer in self.optimizers.items():
            if len(self.optimizers) > 1:
                model.set_adapter(name)
            part = self.parts[name]
            optimizer.zero_grad(set_to_none=True)
            loss = self.call(input_ids=part, labels=part, use_cache=False).loss
            loss.backward()
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.t.parameters[name], 1.0))
            optimizer.step()
            self.losses.append(loss.detach())

    def figures(self):
        loss, norm = [float(x) for x in self.losses], [float(x) for x in self.norms]
        if not (all(x == x and x < float("inf") for x in loss + norm) and min(norm) > 0):
            raise Wrong("loss %s, gradient norm %s" % (loss, norm))
        return sum(loss) / len(loss), min(norm)

    def check(self):
        self.t.restart()
        self.step()
        self.first_loss, first_norm = self.figures()
        trained = {id(q) for part in self.t.parameters.values() for q in part}
        if any(q.grad is not None for q in self.t.model.parameters() if id(q) not in trained):
            raise Wrong("a frozen weight has a gradient")
        eager = getattr(self.t, "first_loss", None)
        if eager is not None and not abs(self.first_loss - eager) <= 2.0**-6 * abs(eager):
            raise Wrong("first loss %g, eager %g" % (self.first_loss, eager))
        self.t.first_loss = self.first_loss if eager is None else eager
        for _ in range(2):
            self.step()
        loss, _ = self.figures()
        if not loss < self.first_loss:
            raise Wrong("loss %g to %g: nothing is learned" % (self.first_loss, loss))
        return "first gradient norm %.3g" % first_norm

    def after(self):
        loss, norm = self.figures()
        if not loss < self.first_loss:
            raise Wrong("loss %g to %g: nothing is learned" % (self.first_loss, loss))
        return "loss %.4f to %.4f, gradient norm %.3g" % (self.first_loss, loss, norm)

    def resident(self):
        states = [v for o in self.optimizers.values() for s in o.state.values() for v in s.values() if hasattr(v, "numel")]
        return bytes_of(*self.t.model.parameters(), *self.t.model.buffers(), *states)


def lora_step(env, case):
    p = case["parameters"]
    if "recompute_layers" in p:
        return []  # compared with the peers of the case that keeps everything
    trained = shared(lambda: Trained(env, p, p["n_adapters"]))
    if p["n_adapters"] > 1:  # PEFT mixes adapters in a batch for inference only
        return [("peft_in_turn", lambda: LoraStep(trained()), False)]
    eager = ("peft_eager", lambda: LoraStep(trained()), False)
    if not case["name"].startswith("lora."):
        return [eager, ("peft_layers_compiled", lambda: LoraStep(trained(), ByLayers(env, trained().model)), False)]
    return [eager, ("peft_compiled", lambda: LoraStep(trained(), env.compile(trained().model)), False),
            ("peft_checkpointed", lambda: LoraStep(Trained(env, p, 1, checkpointing=True)), False)]


class FrozenStep:
    """Forward, loss and input gradients of the frozen model."""

    def __init__(self, env, p, model, call=None):
        self.env, self.model, self.call = env, model, model if call is None else call
        self.tokens = random_tokens(env, p, p["n_seqs"], p["seq_len"])
        self.x = self.gradient = self.loss = None

    def step(self):
        self.x = self.model.get_input_embeddings()(self.tokens).detach().requires_grad_()
        loss = self.call(inputs_embeds=self.x, labels=self.tokens, use_cache=False).loss
        (self.gradient,) = self.env.torch.autograd.grad(loss, self.x)
        self.loss = loss.detach()

    def check(self):
        self.step()
        norm = float(self.gradient.float().norm())
        if not (float(self.loss) < float("inf") and 0 < norm < float("inf")):
            raise Wrong("loss %g, gradient norm %g" % (float(self.loss), norm))
        return "loss %.4f, norm of the input gradient %.3g" % (float(self.loss), norm)

    after = check

    def resident(self):
        return bytes_of(*self.model.parameters(), *self.model.buffers())


def frozen_step(env, case):
    p = case["parameters"]
    model = shared(lambda: base_model(env, p["shape"]).train())
    return [("torch_eager", lambda: FrozenStep(env, p, model()), False),
            ("torch_layers_compiled", lambda: FrozenStep(env, p, model(), ByLayers(env, model())), False)]


# ---------------------------------------------------------------- generation


class Decode:
    """generate(): a sample is one position, (an answer of new + 1 tokens - one of 1) / new."""

    def __init__(self, env, p, model, static, names=None):
        self.env, self.model, self.new = env, model, p["new"]
        self.tokens = random_tokens(env, p, p["batch"], p["prompt"])
        self.vocab = env.config(p["shape"])["vocab_size"]
        self.options = {"attention_mask": env.torch.ones_like(self.tokens)}
        if p["sampler"] == "top_p":
            self.options.update(do_sample=True, temperature=0.8, top_p=0.9, top_k=0)
        else:
            self.options.update(do_sample=False)
        if static:
            self.options["cache_implementation"] = "static"
        if names:
            self.options["adapter_names"] = names

    def answer(self, n):
        with self.env.torch.no_grad():
            return self.model.generate(input_ids=self.tokens, max_new_tokens=n, **self.options)

    def sample(self):
        long = self.env.timed(lambda: self.answer(self.new + 1))  # first: a cache that is large enough is kept
        return (long - self.env.timed(lambda: self.answer(1))) / self.new

    def check(self):
        first, again = self.answer(self.new + 1), self.answer(self.new + 1)
        if first.shape != (self.tokens.shape[0], self.tokens.shape[1] + self.new + 1) or int(first.min()) < 0 or int(first.max()) >= self.vocab:
            raise Wrong("an answer of shape %s" % (tuple(first.shape),))
        if not self.options["do_sample"] and not bool((first == again).all()):
            return "two greedy answers differ"
        return ""


def adapted(env, p):
    """A PEFT model whose adapters do something, and the adapter of each sequence."""
    model = with_adapters(env, p, p["n_adapters"]).eval()
    with env.torch.no_grad():
        for name, q in model.named_parameters():
            if "lora_B" in name:
                q.normal_(std=0.02)
    each = p["batch"] // p["n_adapters"]
    return model, ["a%d" % min(i // max(each, 1), p["n_adapters"] - 1) for i in range(p["batch"])]


def decode(env, case):
    p = case["parameters"]
    if not p["n_adapters"]:
        plain = shared(lambda: base_model(env, p["shape"]).eval())
        peers = [("transformers_eager", lambda: Decode(env, p, plain(), False), False)]
        if p["sampler"] == "greedy":  # the static cache makes transformers compile: a minute each
            peers.append(("transformers_static", lambda: Decode(env, p, plain(), True), False))
        return peers
    model = shared(lambda: adapted(env, p))
    if p["n_adapters"] == 1:
        return [("peft_eager", lambda: Decode(env, p, model()[0], False), False)]
    return [("peft_mixed", lambda: Decode(env, p, model()[0], False, model()[1]), False)]


class Prefill:
    def __init__(self, env, p, model, call=None):
        self.env, self.call, self.tokens, self.logits = env, model if call is None else call, random_tokens(env, p, 1, p["rows"]), None

    def step(self):
        with self.env.torch.no_grad():
            self.logits = self.call(input_ids=self.tokens, use_cache=False, logits_to_keep=1).logits

    def check(self):
        self.step()
        if not bool(self.env.torch.isfinite(self.logits).all()) or self.logits.shape[1] != 1:
            raise Wrong("logits of shape %s, not all finite" % (tuple(self.logits.shape),))
        return ""

    after = check


def prefill(env, case):
    p = case["parameters"]
    model = shared(lambda: base_model(env, p["shape"]).eval())
    return [("transformers_eager", lambda: Prefill(env, p, model()), False),
            ("transformers_layers_compiled", lambda: Prefill(env, p, model(), ByLayers(env, model())), False)]


MAKERS = {f.__name__: f for f in (lora_step, frozen_step, decode, prefill)}
