"""What a method is: policy x budget x schedule x propagation x unit; and every published one."""

from kvtrim import moved


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
