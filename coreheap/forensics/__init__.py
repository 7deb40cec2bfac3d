"""From contradictions in a heap to damages: what happened, where to the byte, and who did it as far as the bytes tell."""

from coreheap.forensics.consolidation import find_interrupted_consolidation
from coreheap.forensics.survey import DAMAGES_KEPT, DamageSurvey, find_damages, held_against

__all__ = ["DAMAGES_KEPT", "DamageSurvey", "find_damages", "find_interrupted_consolidation", "held_against"]
