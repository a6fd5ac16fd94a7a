# Learning curves of an experiment as SVG:
#   ./keepsake show results/quickstart --curve > curve.csv
#   gnuplot -e "csv='curve.csv'; svg='curve.svg'" results/curve.gp
set terminal svg size 760,420 font "sans-serif,13" background "white"
set output svg
set datafile separator ","
set xlabel "arrivals"
set ylabel "ROUGE-1 on held-out questions"
set key outside right center noenhanced
set grid ytics lc rgb "#dddddd"
set border 3
set tics nomirror
labels = system(sprintf("tail -n +2 '%s' | cut -d, -f1 | uniq", csv))
plot for [i = 1:words(labels)] csv using (stringcolumn(1) eq word(labels, i) ? $2 : NaN):3:4:5 with yerrorlines lw 2 pt 7 ps 0.5 title word(labels, i)
