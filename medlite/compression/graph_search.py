"""What lies before and behind a place in an exported graph."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from torch.fx import Node


def meets(node: Node, wanted: Container[Node], direction: Literal["before", "behind"]) -> bool:
    """Whether another node of `wanted` lies before `node`, or behind it.

    >>> from torch.fx import Graph
    >>> graph = Graph()
    >>> image = graph.placeholder("image")
    >>> conv = graph.call_function(abs, (image,))
    >>> head = graph.call_function(abs, (graph.call_function(abs, (conv,)),))
    >>> meets(conv, {conv, head}, "behind"), meets(conv, {conv, head}, "before")
    (True, False)
    """
    neighbours = "users" if direction == "behind" else "all_input_nodes"
    to_visit, seen = [node], {node}
    while to_visit:
        for other in getattr(to_visit.pop(), neighbours):
            if other in wanted and other is not node:
                return True
            if other not in seen:
                seen.add(other)
                to_visit.append(other)
    return False
