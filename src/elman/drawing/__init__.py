"""Pictures of networks, made from the networks themselves: circuits with delays, and unrolled graphs."""

from .diagram import Diagram, Edge, Node
from .draw import Picture, draw

__all__ = ["Diagram", "Edge", "Node", "Picture", "draw"]
