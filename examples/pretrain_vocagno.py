"""Pretrain a student under the guidance of a teacher.

deepspeed --num_gpus 8 examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json [--set a.b=c]
"""

from megatron_vocagno.pretrain import main, run_process

if __name__ == "__main__":
    run_process(main)
