"""Each operator in a few lines of plain PyTorch, any dtype: the definition that the tests use."""
