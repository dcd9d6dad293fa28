"""`python train_kd.py --mode teacher|student --config ...`: the command `train_kd`, from a checkout."""
import sys
from kdocr.training.command import train_command

if __name__ == '__main__': sys.exit(train_command())
