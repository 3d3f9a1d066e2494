"""Vision-and-language navigation: the world as a graph, its simulator, its items and its scores."""
