"""Snapshots of a training state in the memory of members: coded over several of them, read after any few are lost."""
