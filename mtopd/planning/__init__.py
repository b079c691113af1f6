"""Planning: who does what and in which order, decided from metadata before any work begins.

Every planner is a pure function: numbers and metadata in, a plan out.  All ranks call it with the
same arguments and get the same plan without talking to one another, and a resumed run gets the plan
it had before.  Nothing in this package sees a token, a tensor, a file or a process group, and none
of its imports does.

    prompts           which prompts an iteration rolls out
    train_steps       which rank trains on which sample, in which micro-batch, with which weight
    stages            what a model computes, and its layers over the pipeline stages
    layouts           which parallel sizes fit a model
    capacity          what a rank of a run holds in memory
    teacher_passes    which replica of a teacher runs which samples, in which batches and waves
    learning_rate     of every train step
    shares            which bytes of a teacher each rank reads, and where they stand on the device
"""

from mtopd.planning.capacity import Capacity, ModelSizes, in_binary_units, rank_capacity
from mtopd.planning.layouts import (
    Layout,
    choose_slices,
    fitting_layouts,
    in_words,
    sizes_that_work,
    undivided,
    working_sizes,
)
from mtopd.planning.learning_rate import learning_rate
from mtopd.planning.prompts import number_samples, select_prompts
from mtopd.planning.shares import JOIN_ALIGNMENT, Group, Mesh, Part, Range, plan_parts
from mtopd.planning.stages import (
    MAX_STAGE_IMBALANCE,
    Architecture,
    SampleCost,
    StageSplit,
    expressible_splits,
    price_stages,
    propose_split,
)
from mtopd.planning.teacher_passes import Wave, plan_pass, quarters
from mtopd.planning.train_steps import plan_train_steps, row_length

__all__ = [
    "JOIN_ALIGNMENT",
    "MAX_STAGE_IMBALANCE",
    "Architecture",
    "Capacity",
    "Group",
    "Layout",
    "Mesh",
    "ModelSizes",
    "Part",
    "Range",
    "SampleCost",
    "StageSplit",
    "Wave",
    "choose_slices",
    "expressible_splits",
    "fitting_layouts",
    "in_binary_units",
    "in_words",
    "learning_rate",
    "number_samples",
    "plan_parts",
    "plan_pass",
    "plan_train_steps",
    "price_stages",
    "propose_split",
    "quarters",
    "rank_capacity",
    "row_length",
    "select_prompts",
    "sizes_that_work",
    "undivided",
    "working_sizes",
]
