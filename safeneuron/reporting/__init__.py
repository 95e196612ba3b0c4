"""Reports: typed results, tables, sentences, figures and pages; values in, files out.

Reading a run and collecting its results is the business of ``runs``.
"""

from safeneuron._lazy import face

MODULES = {
    "comparison": ("Asked", "Compared", "render_comparison"),
    "figures": (
        "BLUE",
        "COLOURS",
        "FAINT",
        "INK",
        "STROKES",
        "STYLE",
        "WIDTH",
        "as_percent",
        "as_pictures",
        "as_text",
        "colour",
        "headroom",
        "mark",
        "opacity",
        "stroke",
    ),
    "rendering": ("escaped", "fenced", "table_escaped"),
    "report": ("Details", "render"),
    "results": ("COMPARED", "attack_of", "columns_of", "joined_words"),
    "summary": (
        "Point",
        "READING",
        "coherence_caveat",
        "incoherence",
        "limits",
        "over_refusal",
        "perplexity_sentence",
        "random_control",
        "resistance",
    ),
    "tables": ("Table", "as_csv", "attack_table", "outcome_table", "refusal_table"),
    "terminal": ("Grid", "grid_of", "result_table"),
}
__all__, __getattr__, __dir__ = face(__name__, MODULES)
