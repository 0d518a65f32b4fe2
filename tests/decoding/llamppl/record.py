"""Records what `llamppl`'s resampling does, for tests/decoding/test_resampling.py.

    pip install --no-deps --target /tmp/llamppl llamppl==0.2.3
    python tests/decoding/llamppl/record.py /tmp/llamppl > tests/decoding/llamppl/resampling.json

Only ``llamppl/inference/smc_steer.py`` is loaded: the package itself wants language
models. Its weights must be positive; what it does to dead particles is recorded too.
"""  # noqa: E501

import importlib.metadata
import importlib.util
import json
import sys
import types
import warnings

import numpy as np

DRAWS = 20_000


def load(folder):
    for name in ("llamppl", "llamppl.inference", "llamppl.util"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["llamppl"].__path__ = []
    sys.modules["llamppl.inference"].__path__ = []
    # Unused by the two functions called below.
    sys.modules["llamppl.util"].logsumexp = sys.modules["llamppl.util"].softmax = None
    path = f"{folder}/llamppl/inference/smc_steer.py"
    spec = importlib.util.spec_from_file_location("llamppl.inference.smc_steer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(module, weights, n):
    np.random.seed(0)
    counts = np.zeros(len(weights))
    for _ in range(DRAWS):
        kept, drawn, c = module.resample_optimal(weights, n)
        counts[kept] += 1
        counts[drawn] += 1
    return {
        "weights": weights.tolist(),
        "n": n,
        "c": float(c),
        "kept": sorted(kept.tolist()),
        "frequencies": (counts / DRAWS).tolist(),
    }


def main(folder):
    module = load(folder)
    rng = np.random.default_rng(0)
    cases = [np.array([0.4, 0.2, 0.1, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])]
    for size, spread in ((6, 0.3), (12, 2.0), (24, 1.0), (40, 4.0)):
        cases.append(rng.dirichlet(np.full(size, 1.0 / spread)))
    sizes = [4, 3, 4, 8, 10]
    dead = np.array([0.0, 0.0, 0.0, 0.5, 0.3, 0.2])
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides 0 by 0
        kept, drawn, _ = module.resample_optimal(dead, 4)
    (version,) = {
        d.version
        for d in importlib.metadata.distributions(path=[folder])
        if d.name == "llamppl"
    }
    print(
        json.dumps(
            {
                "llamppl": version,
                "draws": DRAWS,
                "cases": [
                    record(module, w, n) for w, n in zip(cases, sizes, strict=True)
                ],
                "dead": {
                    "weights": dead.tolist(),
                    "n": 4,
                    "kept": kept.tolist(),
                    "drawn": drawn.tolist(),
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
