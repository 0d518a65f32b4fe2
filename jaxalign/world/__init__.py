"""The village: an embedded instruction world whose true reward is a program.

Sixteen villagers, four questions one may ask about each (home, pet, job, food), and
demonstrators who answer imperfectly: some err, some are rude, some ramble. Because
:func:`true_reward` judges any text exactly, the effect of every objective can be
measured without a reward model, and with confidence intervals.

Prompts are compositions (opening x wording x villager x closing). They are assigned
to ``train``, ``validation`` and ``test`` by a hash of their text, so the splits are
disjoint whatever the seed, and every test prompt is an unseen combination of seen
parts.

>>> true_reward("Where does Ada live?", "Gladly! Ada lives at the mill.")
1.0
>>> true_reward("Where does Ada live?", "Ugh! Ada lives at the farm.")
0.2
"""

from jaxalign.world.dataset import (
    DEMONSTRATORS,
    SCHEMAS,
    SIZES,
    draw,
    draws,
    respond,
    rows,
    write_dataset,
)
from jaxalign.world.reward import (
    best_response,
    explain,
    judge,
    rationale,
    true_reward,
)
from jaxalign.world.village import (
    SPLITS,
    STATEMENTS,
    VILLAGERS,
    WORDINGS,
    parse,
    prompts,
    sample_prompts,
    split_of,
    statement,
    values_of,
)

__all__ = [
    "DEMONSTRATORS",
    "SCHEMAS",
    "SIZES",
    "SPLITS",
    "STATEMENTS",
    "VILLAGERS",
    "WORDINGS",
    "best_response",
    "draw",
    "draws",
    "explain",
    "judge",
    "parse",
    "prompts",
    "rationale",
    "respond",
    "rows",
    "sample_prompts",
    "split_of",
    "statement",
    "true_reward",
    "values_of",
    "write_dataset",
]
