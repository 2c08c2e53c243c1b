"""Pipeline parallelism: a model cut into stages, and the order in which ranks run them."""
