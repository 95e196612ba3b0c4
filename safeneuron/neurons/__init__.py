"""The seam: where a neuron is, what it owns, and how it is recorded, edited and proved.

The only package that knows an architecture; everything else speaks of (layer, neuron).
"""

from safeneuron._lazy import face

MODULES = {
    "anatomy": ("decoder_of", "hidden_size", "layers_of"),
    "blocks": ("Block", "Layer", "OutputProjection", "Slice"),
    "interventions": ("Change", "Edit", "edited", "everywhere", "pruned", "recorded", "require_eager"),
    "layout": (
        "HasNetwork", "LINEAGE", "config_of", "feed_forwards", "fingerprint", "layers",
        "names_in", "network_of", "neuron_addresses", "neurons_at", "require_dense", "widths_of",
    ),
    "linears": ("acting", "linear_in", "size_of"),
    "neuron_set": ("NeuronSet", "NeuronSetRecord", "VISION_SUFFIX"),
    "statistics": (
        "ActivationStats", "GroupMoments", "Moments", "TopicStats", "bootstrap_weights",
        "label_weights", "load_tensors", "pair_weights", "save_tensors",
    ),
    "verification": ("Proof", "prove", "settle_layout"),
    "weights": ("has_adapters", "owned_slices", "parameters_of_no_neuron", "require_trainable", "routers"),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
