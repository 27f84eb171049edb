"""The tasks, by the names that `--task` takes."""

from tasks.adding import Adding
from tasks.copying import Copying
from tasks.sequential_mnist import SequentialMNIST
from tasks.task import Task

TASKS: dict[str, type[Task]] = {"sequential_mnist": SequentialMNIST, "copying": Copying, "adding": Adding}
