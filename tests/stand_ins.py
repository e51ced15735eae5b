"""Stand-ins for what only a GPU has."""

from typing import ClassVar


class Graph:
    """models.graphs.CudaGraph where there is none: capturing runs nothing, a replay runs the function. made and
    replayed: how often, by the number of rows."""

    made: ClassVar[list[int]] = []
    replayed: ClassVar[list[int]] = []

    def __init__(self, function, pool):
        assert pool == "pool"
        self.function = function
        self.made.append(function.args[0])

    def replay(self):
        self.replayed.append(self.function.args[0])
        return self.function()

    @staticmethod
    def make_pool():
        return "pool"

    @staticmethod
    def warm_up(function):
        function()
