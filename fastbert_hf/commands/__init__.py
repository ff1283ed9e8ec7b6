"""
The commands: everything that the package does, with options and printed tables.

Each is a file with a `main`. The scripts in `examples/` call them; without those scripts, they are called as
`python -m fastbert_hf.commands.self_distill --help`.
"""
