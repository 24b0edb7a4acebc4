"""The families that have a bundled checkpoint, by its name in IDEFICS_MODEL."""

from collections.abc import Mapping

from worker.demo.training.family import Family
from worker.demo.training.idefics import Idefics
from worker.demo.training.smolvlm import SmolVlm

FAMILIES: Mapping[str, Family] = {family.name: family for family in (Idefics(), SmolVlm())}
