"""`python -m fuzzing.seeds`: write the corpus, with which fuzzing begins, again."""

from __future__ import annotations

from fuzzing import CORPUS, NAMES, target


def main() -> None:
    """Write every seed of every target."""
    for name in NAMES:
        place = CORPUS / name
        place.mkdir(parents=True, exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for seed, data in target(name).seeds().items():
            (place / seed).write_bytes(data)


if __name__ == "__main__":
    main()
