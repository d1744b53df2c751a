"""A study of a few steps."""

import json

from small_runs import NETWORK

PLAIN = json.dumps({name: value for name, value in NETWORK.items() if "decoder" not in name})
STUDY = {
    "title": "A small study",
    "about": "Of nothing much.",
    "settings": {
        "preset": "digits",
        "max_train_steps": 4,
        "evaluation_steps": 2,
        "evaluation_samples": 8,
        "train_batch_size": 16,
        "num_prototypes": 32,
        "head_hidden_dim": 16,
        "num_validation_images": 0,
    },
    "seeds": [0, 5],
    "metric": "fid_pixels",
    "runs": {
        "DiT": {"method": "dit", "transformer": PLAIN},
        "SD-DiT": {"mask_ratio": 0.5, "transformer": json.dumps(NETWORK)},
        "mask 0": {"mask_ratio": 0.0, "transformer": json.dumps(NETWORK)},
    },
    "tables": [
        {"title": "Table 1: convergence", "kind": "steps", "paper": {"DiT": 68.40, "SD-DiT": 48.39}},
        {"title": "Figure 3: speed", "kind": "speed", "paper": {"DiT": [5.03, 68.40], "SD-DiT": None}},
        {
            "title": "Figure 5",
            "kind": "setting",
            "setting": "mask_ratio",
            "paper": {"mask 0": 58.92, "SD-DiT": None},
        },
        {
            "title": "Diagnostics",
            "kind": "metrics",
            "columns": ["kl"],
            "paper": {"DiT": None, "SD-DiT": None},
        },
        {"title": "Probe", "kind": "probe", "sigmas": [0.1], "paper": {"DiT": None, "SD-DiT": None}},
        {
            "title": "Sampler",
            "kind": "sampling",
            "run": "DiT",
            "samplings": {"N = 2": {"num_inference_steps": 2}, "rho 3": {"scheduler": {"rho": 3}}},
            "paper": {"N = 2": None, "rho 3": None},
        },
    ],
}

SSD = {"of": "SD-DiT", "num_inference_steps": 4, "fusion_weight": 0.3}
LINES = {
    "Euler": {"run": "SD-DiT", "num_inference_steps": [2, 4], "scheduler": {"solver": "euler"}},
    "theirs": {"run": "SD-DiT", "num_inference_steps": [4], "scheduler_class": "EDMEulerScheduler"},
    "Heun": {"run": "SD-DiT", "num_inference_steps": [2, 3]},
    "SSD": ["SSD 4", "SSD 2"],
}
EVALUATIONS = {
    "title": "Evaluations",
    "kind": "evaluations",
    "lines": LINES,
    "paper": dict.fromkeys(LINES) | {"SSD": [32, 1.99]},
}
# Of a run, its child and the child's child.
CHILDREN = STUDY | {
    "seeds": [5],
    "distillation": {"max_train_steps": 4, "evaluation_steps": 2, "train_batch_size": 16},
    "runs": {
        "SSD 2": {"of": "SSD 4", "num_inference_steps": [2], "fusion_weight": [0.25]},
        "SSD 4": SSD,
        "SD-DiT": STUDY["runs"]["SD-DiT"],
    },
    "tables": [
        {"title": "Steps", "kind": "steps", "paper": {"SSD 4": None, "SSD 2": None}},
        {"title": "Lambda", "kind": "setting", "setting": "fusion_weight", "paper": {"SSD 4": None}},
        EVALUATIONS,
    ],
}
