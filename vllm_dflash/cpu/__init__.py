"""All that only a CPU runs: layers kernel by kernel, verification, sampling, huge pages;
``backend.py`` is the way in."""
