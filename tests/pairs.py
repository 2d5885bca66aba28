"""Pairs of runs that read the same text: the same traces, with some tokens routed otherwise."""

from dataclasses import replace

import numpy as np
from synthetic import synthetic_spec, synthetic_traces

from ling_probe.routing import route
from ling_probe.run import Run


def plain_traces(n_sequences=30, *, seed=0, spec=None, **options):
    return synthetic_traces(spec or synthetic_spec(), n_sequences, rng=np.random.default_rng(seed), **options)


def rerouted(traces, *, share=1.0, seed=1, by_token=0.0):
    """The same texts, a share of all choices from fresh logits; those follow the token id as far as `by_token` says."""
    rng, spec = np.random.default_rng(seed), traces[0].spec
    own = np.random.default_rng(0).normal(0, by_token, (spec.vocab_size, spec.n_rows, spec.n_experts))
    bias = np.zeros((spec.n_rows, spec.n_experts))
    found = []
    for trace in traces:
        logits = own[trace.token_ids] + rng.normal(0, 1, (trace.n_tokens, spec.n_rows, spec.n_experts))
        new, moved = route(logits, bias, spec), rng.random((trace.n_tokens, spec.n_rows)) < share
        ids, weights = trace.expert_ids.copy(), trace.weights.copy()
        ids[moved], weights[moved] = new.ids[moved], new.weights[moved].astype(np.float32)
        found.append(replace(trace, expert_ids=ids, weights=weights))
    return found


def relabelled(traces, *, seed=2):
    """The same routing with the experts of each layer numbered anew; groups are not kept."""
    rng, spec = np.random.default_rng(seed), traces[0].spec
    names = np.stack([rng.permutation(spec.n_experts) for _ in range(spec.n_rows)])
    rows = np.arange(spec.n_rows)[:, None]
    return [
        replace(trace, expert_ids=names[rows, trace.expert_ids].astype(spec.id_dtype), group_limited=False) for trace in traces
    ]


def write_run(folder, traces, *, name="synthetic", parts=1, **model) -> Run:
    run = Run.create(
        folder, spec=traces[0].spec, model={"name": name, "digest": str(folder), **model}, benchmark={}, options={}
    )
    for places in np.array_split(np.arange(len(traces)), parts):
        run.append([traces[place] for place in places])
    return run


def common(one, other) -> np.ndarray:
    """[T M] experts in common over all tokens of two lists of traces, the slow way."""
    return np.array(
        [
            [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(here, there, strict=True)]
            for first, second in zip(one, other, strict=True)
            for here, there in zip(first.expert_ids, second.expert_ids, strict=True)
        ]
    )
