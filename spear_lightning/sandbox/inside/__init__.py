"""What runs inside the bubblewrap sandbox: the standard library and relative imports only.

This folder alone is bound into the sandbox, where the rest of the project does not exist; hence the relative imports.
"""
