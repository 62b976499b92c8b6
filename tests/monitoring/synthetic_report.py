"""This module builds routing reports of random figures, with plain or with hostile texts."""

import numpy as np

from modeling_moe.monitoring.report.data import (
    LayerChange,
    LayerSummary,
    LayerTrace,
    ModelChanges,
    ModelTrace,
    RoutingReport,
    TopToken,
    TracedText,
)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\x00\x01\x1b[31m",
    "\u202eabc\u202d",
    "&amp;\"'`${x}",
    "x" * 10_000,
    "\u2028\u2029",
    "\ufffd",
    "<!--",
    "\n",
]
WORDS = [" the", " Weg", "führt", "日本", "🙂", "\n", " return", "(", " of", "."]
EDGES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def _summary(random: np.random.Generator, experts: int) -> dict[str, float]:
    token = float(random.uniform(0.2, np.log(experts)))
    return {
        "max_violation": float(random.gamma(1.0)),
        "dead_experts": float(random.integers(0, 2) / experts),
        "mean_experts": 2.0,
        "dropped_share": 0.0,
        "token_entropy": token,
        "marginal_entropy": float(random.uniform(token, np.log(experts))),
        "gate_margin": float(random.uniform(0, 0.4)),
    }


def _layer(random: np.random.Generator, layer: int, experts: int, domains: int, top_k: int, words: list[str]):
    share = random.dirichlet(np.full(experts, 2.0), size=domains)
    ratio = np.log2(share / share.mean(axis=0))
    together = random.uniform(0, 0.1, (experts, experts))
    return LayerTrace(
        **_summary(random, experts),
        layer=layer,
        name=f"model.layers.{layer}.mlp.experts",
        num_experts=experts,
        top_k=top_k,
        by_domain=[LayerSummary(**_summary(random, experts)) for _ in range(domains)],
        load=(share * 20_000).astype(np.int64),
        co_activation=(together + together.T) / 2 + np.diag(share.mean(axis=0) * top_k),
        position=(random.dirichlet(np.full(experts, 5.0), size=len(EDGES) - 1) * 1000).astype(np.int64),
        specialisation=ratio,
        significant=np.abs(ratio) > 0.7,
        top_tokens=[
            [
                TopToken(
                    word, int(random.integers(5, 90)), float(random.uniform(0.3, 1)), ("before it ", word, " after")
                )
                for word in random.choice(np.array(words, dtype=object), size=8)
            ]
            for _ in range(experts)
        ],
    )


def _text(random: np.random.Generator, domain: str, layers: int, experts: int, top_k: int, words: list[str]):
    size = 256
    index = np.argsort(random.random((layers, size, experts)), axis=-1)[..., :top_k].astype(np.int32)
    weight = random.dirichlet(np.ones(top_k), size=(layers, size)).astype(np.float32)
    index[:, ::17, -1] = -1
    weight[:, ::17, -1] = 0
    margin = random.uniform(0, 0.5, (layers, size)).astype(np.float32)
    tokens = [str(word) for word in random.choice(np.array(words, dtype=object), size=size)]
    return TracedText(domain, tokens, index, weight, margin)


def synthetic_model(
    layers: int, experts: int, domains: int, texts: int, seed: int, hostile: bool = False, top_k: int = 2
) -> ModelTrace:
    """Returns a model's trace of random figures; `texts` is the number of traced texts of each domain."""
    random, words = np.random.default_rng(seed), HOSTILE if hostile else WORDS
    names = [f"domain {place}" for place in range(domains)]
    if hostile:
        names = [f"{HOSTILE[place % len(HOSTILE)]} {place}" for place in range(domains)]
    return ModelTrace(
        name=HOSTILE[0] if hostile else f"tiny-{seed}",
        facts={"architecture": HOSTILE[1] if hostile else "MoEForCausalLM", "parameters": "1,234 (567 active)"},
        domains=names,
        tokens=dict.fromkeys(names, 10_000),
        losses={name: float(random.uniform(1, 4)) for name in names},
        layers=[_layer(random, layer, experts, domains, top_k, words) for layer in range(layers)],
        paths=[random.integers(0, 2000, (experts, experts)) for _ in range(layers - 1)],
        position_edges=EDGES,
        texts=[_text(random, name, layers, experts, top_k, words) for name in names for _ in range(texts)],
    )


def synthetic_history(layers: int, steps: int, seed: int) -> list[dict]:
    """Returns log entries of a training run as trainer_state.json holds them."""
    random, entries = np.random.default_rng(seed), []
    for step in range(10, 10 * steps + 1, 10):
        entry = {"step": step, "loss": 4 - step / 1000}
        for figure in ("max_violation", "marginal_entropy", "dead_experts", "gate_margin"):
            values = random.uniform(0, 1, layers)
            entry |= {f"routing/layer_{layer:02d}/{figure}": float(value) for layer, value in enumerate(values)}
            entry[f"routing/{figure}"] = float(values.mean())
        entries.append(entry)
    return entries


def synthetic_report(
    layers: int = 2,
    experts: int = 4,
    domains: int = 3,
    texts: int = 1,
    seed: int = 0,
    hostile: bool = False,
    compare: bool = False,
    history: bool = False,
    top_k: int = 2,
) -> RoutingReport:
    """Returns a report of random figures; equal arguments give equal reports."""
    places = range(2 if compare else 1)
    models = [synthetic_model(layers, experts, domains, texts, seed + place, hostile, top_k) for place in places]
    changes = None
    if compare:
        random = np.random.default_rng(seed)
        moved = [
            LayerChange(layer, str(layer), random.uniform(0, 1, domains), float(random.random()))
            for layer in range(layers)
        ]
        changes = ModelChanges(moved, "Both models read the same tokens.")
    return RoutingReport(models, changes, synthetic_history(layers, 20, seed) if history else None)
