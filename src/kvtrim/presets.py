"""Settings that several presets of `METHODS` share."""

KVPRESS_WINDOW = {
    "window": 64,
    "kernel": 5,
    "pool": "avg",
    "rows": "mean",
    "group_order": "after",
}
KVF_WINDOW = {"window": 8, "kernel": 7, "pool": "max"}
CURDKV_PRESETS = {
    "paper": {},
    "authors": {"project": None, "local_window": 16, "padding": "front"},
    "kvpress": {"project": None, "local_window": 16, "padding": "tail"},
}
CAKE_TAUS = {  # tau1, tau2
    "llama-3.1-8b-1024": (1.6, 0.4),
    "llama-3.1-8b-128": (1.6, 0.6),
    "mistral-7b-v0.3-1024": (0.8, 0.5),
    "mistral-7b-v0.3-128": (1.0, 0.8),
    "qwen2.5-7b-1024": (1.5, 0.6),
    "qwen2.5-7b-128": (0.4, 0.6),
    "llama-2-7b-1024": (1.9, 1.8),
    "llama-2-7b-128": (0.9, 2.3),
    "llama-2-13b-1024": (0.5, 0.4),
    "llama-2-13b-128": (1.8, 2.0),
}
CAKE_PRESETS = {name: {"tau1": one, "tau2": two} for name, (one, two) in CAKE_TAUS.items()}
