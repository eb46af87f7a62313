"""The commands of ``optinfer``: one file each."""
