# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, run by ``zipserv bench``: every figure against its limit, measured in the same run.

``gpu``: the scoreboard over model shapes; ``single``: one shape; ``codec``: compression on the CPU; ``report``: tables,
JSON and plots of what they measured.
"""
