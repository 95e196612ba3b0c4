"""Reports: typed results, tables, sentences, figures and pages; values in, files out.

Reading a run and collecting its results is the business of ``runs``.
"""

from safeneuron._lazy import face

MODULES = {
    "charts": ("charts_of",),
    "comparison": ("Compared", "JudgedAttack", "difference_of", "holm_corrected", "render_comparison"),
    "details": ("Details", "JudgedAnswer", "Provenance", "StageCost", "StrongNeuron"),
    "figures": ("as_pictures",),
    "formatting": ("Table", "attack_title", "joined_words"),
    "records": ("CapabilityScore", "JudgeAgreement", "LayerCounts", "SelectionResult", "StateDifference",
                "TrainingResult", "TrainingStep", "read_record"),
    "rendering": ("escaped", "fenced", "table_escaped"),
    "report": ("render_report",),
    "results": ("ADAPTIVE", "COMPARED", "INTACT", "AttackResult", "Counts", "DensityPoint", "RunResults",
                "StateResults", "results_schema"),
    "style": ("BLUE", "COLOURS", "FAINT", "INK", "STROKES", "STYLE", "WIDTH", "as_percent", "as_text", "colour",
              "headroom", "mark", "opacity", "stroke"),
    "summary": ("Point", "READING", "coherence_caveat", "incoherence", "limits", "over_refusal",
                "perplexity_sentence", "random_control", "resistance"),
    "tables": ("as_csv", "attack_table", "outcome_table", "refusal_table"),
    "terminal": ("result_lines", "terminal_table"),
}  # fmt: skip
__all__, __getattr__, __dir__ = face(__name__, MODULES)
