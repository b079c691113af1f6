"""mtopd: consolidate many specialist teachers into one student by full-vocabulary on-policy
distillation.
"""

from mtopd.types import MtopdError

__all__ = ["MtopdError"]
__version__ = "0.1.0"
