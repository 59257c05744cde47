"""What the teacher is asked, in words. Changed words are other requests, whose answers are asked for anew."""

from __future__ import annotations

from collections.abc import Sequence

from generate.seeds import SeedTask

NONE = "none"
"""How an empty input is written."""

MORE_TASKS = """Below is a list of tasks that people give to an assistant that reads and writes text.

{tasks}

Continue the list with {count} new tasks, numbered from {first}.
- Each differs from all others in what it is about and in what is to be done. Vary verb, subject and length.
- Mix questions, commands, puzzles, creative work, everyday work and sorting into categories.
- The assistant has nothing but text: it sees and makes no pictures and opens no documents.
- One or two sentences a task, each task on one line. Where a task needs data, describe what will be given.
Write only the numbered list."""

IS_CLASSIFICATION = """A classification task is one whose right answer is one of a small, fixed set of labels. Say of
the last task whether it is one. Answer yes or no.

{examples}

Task: {task}
Classification:"""

INPUT_FIRST = """Give examples of a task: an input that someone may have, and the right output. A task that says all
that is needed has the input "none" and one example only.
Of other tasks give up to {count} examples, each with another input.

{examples}

Task: {task}
Write the examples in the same form, each beginning with "Input:", and nothing else."""

OUTPUT_FIRST = """Give examples of a classification task: first a label, then an input that this label is right for.
Give up to {count} examples, each with another label where the task has so many.

{examples}

Task: {task}
Write the examples in the same form, each beginning with "Label:", and nothing else."""

EVOLVE = """Rewrite a task that someone gave to an assistant. {how}

It must still be a task that a person can understand and an assistant can do with text alone. Change or add no more
than 20 words where that is enough. Keep any text or data that belongs to it.
Write only the new task, without a heading.

The task:
{task}"""

DEPTH = {
    "add_constraints": "Add one more condition or requirement to it.",
    "deepen": "Ask for more depth and breadth on what it is about.",
    "concretise": "Replace general ideas in it by more specific ones.",
    "add_steps": "Make it one that needs several steps of reasoning, where a few would do now.",
    "complicate_input": "Add data to it, as a table, code, a formula or a list, which the answer depends on.",
}
BREADTH = {
    "mutate": "Write, instead of it, a new task from the same field that is rarer, and about as long and as hard.",
}
"""How a task is evolved; `mutate` makes another one of the same field."""

GAINS = """Two tasks:

First: {parent}

Second: {evolved}

Are they equal: the same conditions and requirements, and the same depth and breadth? Answer equal or different."""

LEAKS = (
    "the task:",
    "new task",
    "given task",
    "rewritten task",
    "rewrite a task",
    "#rewritten prompt#",
    "given prompt",
)
"""Words of the prompt that an evolved task only holds where the teacher repeated them."""


def more_tasks(context: Sequence[str], count: int) -> str:
    """Asks for new tasks after those in context."""
    tasks = "\n".join(f"{number}. {' '.join(task.split())}" for number, task in enumerate(context, 1))
    return MORE_TASKS.format(tasks=tasks, count=count, first=len(context) + 1)


def is_classification(task: str, examples: Sequence[SeedTask]) -> str:
    """Asks of what kind a task is."""
    shown = [f"Task: {one.instruction}\nClassification: {'yes' if one.classification else 'no'}" for one in examples]
    return IS_CLASSIFICATION.format(task=task, examples="\n\n".join(shown))


def instances(task: str, examples: Sequence[SeedTask], classification: bool, count: int) -> str:
    """Asks for instances of a task."""
    shown = "\n\n".join(f"Task: {one.instruction}\n{_instances(one)}" for one in examples)
    return (OUTPUT_FIRST if classification else INPUT_FIRST).format(task=task, examples=shown, count=count)


def evolve(task: str, operation: str) -> str:
    """Asks for a harder task, or another one."""
    return EVOLVE.format(how={**DEPTH, **BREADTH}[operation], task=task)


def gains(parent: str, evolved: str) -> str:
    """Asks whether a task became another one."""
    return GAINS.format(parent=parent, evolved=evolved)


def _instances(task: SeedTask) -> str:
    return "\n".join(
        f"Label: {one.output}\nInput: {one.input}"
        if task.classification
        else f"Input: {one.input or NONE}\nOutput: {one.output}"
        for one in task.instances
    )
