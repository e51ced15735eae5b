"""Stand-ins for parts that need a GPU."""

from typing import ClassVar


class Graph:
    """Replaces models.graphs.CudaGraph: capturing runs nothing, a replay runs the function. made, replayed: the numbers
    of rows of the captures and replays."""

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
