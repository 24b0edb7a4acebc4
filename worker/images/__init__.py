"""The pictures of jobs: read from their sources, decoded, cached.

`loader.py` loads a job's images, `sources.py` reads files and data: URIs, `fetch.py` downloads (which addresses are
allowed is decided in `worker/net/policy.py`), `download_limits.py` limits downloads, `decode.py` decodes.
"""
