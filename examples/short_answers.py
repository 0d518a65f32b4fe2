"""A judge: any function of a prompt and a response. Larger is better.

It is called ``examples/short_answers.py:score`` wherever a judge is asked for:
``jaxalign eval --judge=``, ``iterate --judge=``, ``steer --potential=``.
"""


def score(prompt: str, response: str) -> float:
    """Few different characters: what a tiny network can learn to care about."""
    del prompt
    return -float(len(set(response)))
