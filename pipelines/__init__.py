"""Composition: the only place where the parts of mtopd meet.  Installed as mtopd.pipelines."""
