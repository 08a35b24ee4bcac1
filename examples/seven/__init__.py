"""The seven models that the page of the bug report names, by their public architectures, with random weights.

``examples/models.py`` runs them, ``tests/unit/test_seven_models.py`` tests small ones of them; ``docs/models.md`` says
what stands in for what. Each becomes engines as its user would make them: a tower for pictures or sound, and a language
model with a cache.
"""

from seven.build import MAKERS, Model, Prompt, make

__all__ = ["MAKERS", "Model", "Prompt", "make"]
