"""Text that every Python has: the documentation topics behind `help()`, in two disjoint parts."""

import platform

from subbit.errors import CalibrationError

__all__ = ["HELD_OUT", "topic_documents", "topic_origin"]

# every fifth topic in sorted order, counted from the first, is for evaluation
HELD_OUT = 5


def topic_documents(role: str) -> list[str]:
    """Return the topics for `role`, "calibration" or "evaluation", one document a topic.

    Topics quote each other at length ("compound" holds all of "if", "for", ...). A paragraph is
    therefore kept once only, and one that occurs in a held-out topic is kept there: no paragraph
    is in both roles. The text depends on the Python version.

    Raises:
        CalibrationError: this Python was packaged without its topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python was installed without 'pydoc_data.topics', so the source 'stdlib' is not "
            "there; give a .txt or .jsonl file instead"
        ) from error
    names = sorted(topics)
    held_out = names[::HELD_OUT]
    seen: set[str] = set()
    parts = {"evaluation": _first_occurrences([topics[name] for name in held_out], seen)}
    rest = [topics[name] for name in names if name not in set(held_out)]
    parts["calibration"] = _first_occurrences(rest, seen)
    return parts[role]


def topic_origin() -> str:
    """Return where the topics come from, with the Python version that they belong to."""
    return f"pydoc_data.topics of Python {platform.python_version()}"


def _first_occurrences(documents: list[str], seen: set[str]) -> list[str]:
    """Drop paragraphs already in `seen` (compared without their spacing) and add the others."""
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    return kept
