"""The ``llvm`` backend: loops as machine code, made with llvmlite; no compiler on the user's machine."""
