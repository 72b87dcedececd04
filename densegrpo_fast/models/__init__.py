"""Flow models behind one contract (`base.FlowModel`); guidance lives here and nowhere else."""
