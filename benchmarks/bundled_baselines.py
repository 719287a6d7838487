"""What word counting does on the bundled data set: the baselines in the README.

.venv/bin/python benchmarks/bundled_baselines.py
"""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from foreword.data.sources import read_table

NEGATIVE = set(
    "not no never nothing nobody broken late wrong refund waiting wait problem still worst bad "  # noqa: SIM905
    "disappointed disappointing cancel terrible rude awful horrible unacceptable poor failed fault "
    "missing damaged complaint angry useless furious error without".split()
)


def main() -> None:
    """Prints the accuracy of three baselines on the 100 held-out rows."""
    (x, y), (held_x, held_y) = (columns(split) for split in ("train", "test"))
    for name, vectorizer in (
        ("TF-IDF words 1-2", TfidfVectorizer(ngram_range=(1, 2))),
        ("TF-IDF characters 2-5", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))),
    ):
        model = make_pipeline(vectorizer, LogisticRegression(max_iter=1000)).fit(x, y)
        print(f"{name} + logistic regression: {model.score(held_x, held_y):.2f}")
    hits = [any(w in NEGATIVE for w in text.lower().replace(",", " ").replace(".", " ").split()) for text in held_x]
    right = sum((label == "complaint") == hit for label, hit in zip(held_y, hits, strict=True))
    print(f"{len(NEGATIVE)} negative words: {right / len(held_y):.2f}")


def columns(split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split."""
    table = read_table("bundled:complaints", split)
    return [str(r["text"]) for r in table.rows], [str(r["label"]) for r in table.rows]


if __name__ == "__main__":
    main()
