// SPDX-License-Identifier: Apache-2.0

package engine_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/zipserv/zipserv/core/cuda/drivertest"
	"github.com/zipserv/zipserv/core/cuda/engine"
	"github.com/zipserv/zipserv/core/cuda/jit"
	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/tuned"
)

var few = tuned.Problem{M: 4096, K: 4096, Tokens: 16}

// shape is grid and block of the last launch.
func shape(t *testing.T, f *drivertest.Fake) string {
	t.Helper()
	all := launches(f)
	require.NotEmpty(t, all)
	return regexp.MustCompile(`grid \d+,1,1 block \d+`).FindString(all[len(all)-1])
}

func multiply(t *testing.T, d *engine.Device, n uint64) (expand bool) {
	t.Helper()
	p := engine.Matmul{Stream: 0x77, Blob: 0x1000, M: 4096, K: 4096, N: n, X: 0x20000, LdX: 4096, Y: 0x30000, LdY: 4096}
	needs, err := d.Linear(&p)
	require.NoError(t, err)
	if needs > engine.NeedsExpand {
		p.Scratch, p.ScratchBytes = 0x700000, needs
		needs, err = d.Linear(&p)
		require.NoError(t, err)
	}
	return needs == engine.NeedsExpand
}

func TestAChoiceIsUsedByItsBucketUntilItIsTakenBack(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	multiply(t, d, 3)
	usual := shape(t, f)
	require.NoError(t, d.Choose(few, &plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 96}))
	assert.NotEqual(t, usual, "grid 96,1,1 block 256")
	for _, n := range []uint64{1, 8, 9, 16} {
		multiply(t, d, n)
		assert.Equal(t, "grid 96,1,1 block 256", shape(t, f))
	}
	multiply(t, d, 17)
	assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f))
	now, err := d.Current(few)
	require.NoError(t, err)
	assert.Equal(t, plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 96}, now)

	require.NoError(t, d.Choose(tuned.Problem{M: 4096, K: 4096, Tokens: 64}, &plan.Choice{Kernel: plan.Expanded}))
	assert.True(t, multiply(t, d, 40))
	require.NoError(t, d.Unchoose(tuned.Problem{M: 4096, K: 4096, Tokens: 64}))
	assert.False(t, multiply(t, d, 40))

	require.NoError(t, d.Unchoose(few))
	multiply(t, d, 3)
	assert.Equal(t, usual, shape(t, f))

	var wrong engine.ArgumentError
	assert.ErrorAs(t, d.Choose(few, &plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 1000}), &wrong)
	assert.ErrorAs(t, d.Choose(tuned.Problem{M: 0, K: 1, Tokens: 1}, nil), &wrong)
	assert.ErrorAs(t, d.Choose(tuned.Problem{M: 1, K: 1}, nil), &wrong)
	_, err = d.Split(few, 1000)
	assert.ErrorAs(t, err, &wrong)
	multiply(t, d, 3)
	assert.Equal(t, usual, shape(t, f), "a refused choice changes nothing")
}

// All numbers of tokens of a bucket take one launch of the chosen layout.
func TestAChoiceOfTheKernelForManyTokens(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	bucket := tuned.Problem{M: 4096, K: 4096, Tokens: 512}
	pair := plan.Choice{Kernel: plan.Pair, MW: 2, KW: 4, Blocks: 120}
	require.NoError(t, d.Choose(bucket, &pair))
	f.Reset()
	for i, n := range []uint64{385, 400, 511, 512} {
		assert.False(t, multiply(t, d, n))
		require.Len(t, launches(f), i+1)
		assert.Contains(t, launches(f)[i], "zs_zipgemm_pair grid 120,1,1 block 384")
	}
	assert.Zero(t, count(f, "load"), "choosing has prepared it")
	now, err := d.Current(bucket)
	require.NoError(t, err)
	assert.Equal(t, pair, now)
	list, err := d.Candidates(bucket)
	require.NoError(t, err)
	layouts := 0
	for _, c := range list {
		require.NoError(t, d.Prepare(bucket, c))
		if c.Kernel == plan.Pair {
			layouts++
		}
	}
	assert.Equal(t, 3, layouts)
	var wrong engine.ArgumentError
	for _, c := range []plan.Choice{{Kernel: plan.Pair, MW: 2, KW: 4, Blocks: 121}, {Kernel: plan.Pair, MW: 1, KW: 4, Blocks: 120}, {Kernel: "mma"}} {
		assert.ErrorAs(t, d.Choose(bucket, &c), &wrong)
	}
	assert.ErrorAs(t, d.Choose(few, &pair), &wrong)
}

// The batch-invariant mode has one choice for every number of tokens.
func TestAnInvariantChoiceServesAllTokens(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	all := tuned.Problem{M: 4096, K: 4096, Invariant: true}
	require.NoError(t, d.Choose(all, &plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 96}))
	multiply(t, d, 1)
	assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f), "the mode is off")
	engine.SetInvariant(true)
	defer engine.SetInvariant(false)
	for _, n := range []uint64{1, 8, 16, 33, 64, 65, 200, 8192} {
		assert.False(t, multiply(t, d, n))
		assert.Equal(t, "grid 96,1,1 block 256", shape(t, f))
	}
	require.Error(t, d.Choose(all, &plan.Choice{Kernel: plan.Expanded}))
}

func save(t *testing.T, d *engine.Device) string {
	t.Helper()
	path, total, err := d.SaveTuned([]tuned.Entry{
		{Problem: few, Choice: plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 96}, Seconds: 1e-6, DefaultSeconds: 2e-6},
		{Problem: tuned.Problem{M: 4096, K: 4096, Invariant: true}, Choice: plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 64}, Seconds: 1, DefaultSeconds: 2},
	})
	require.NoError(t, err)
	assert.Equal(t, 2, total)
	return path
}

// again opens another engine over the same cache directory, as a later process does.
func again(t *testing.T) (*drivertest.Fake, *engine.Engine) {
	t.Helper()
	f := drivertest.New(t)
	e, err := engine.NewFrom(f.Open(), stubs)
	require.NoError(t, err)
	return f, e
}

func TestSavedChoicesAreUsedByLaterProcesses(t *testing.T) {
	open(t)
	t.Setenv(jit.EnvCacheDir, t.TempDir())
	_, e := again(t)
	path := save(t, device(t, e, 0))

	f, e := again(t)
	d := device(t, e, 0)
	multiply(t, d, 5)
	assert.Equal(t, "grid 96,1,1 block 256", shape(t, f))
	require.NotNil(t, e.Describe().Devices[0].Tuned)
	assert.Equal(t, engine.TunedDescription{Choices: 2}, *e.Describe().Devices[0].Tuned)
	engine.SetInvariant(true)
	multiply(t, d, 5)
	engine.SetInvariant(false)
	assert.Equal(t, "grid 64,1,1 block 256", shape(t, f))
	require.NoError(t, d.Choose(few, nil))
	multiply(t, d, 5)
	assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f), "a choice of the process stands over the file's")

	f.Reset()
	for range 3 {
		multiply(t, d, 5)
	}
	assert.Equal(t, len(f.Log()), count(f, "launch")+count(f, "tensor"), "nothing but launches on the hot path: %v", f.Log())

	unused := func(t *testing.T) engine.TunedDescription {
		f, e := again(t)
		multiply(t, device(t, e, 0), 5)
		assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f))
		require.NotNil(t, e.Describe().Devices[0].Tuned)
		return *e.Describe().Devices[0].Tuned
	}
	t.Run("switched off", func(t *testing.T) {
		t.Setenv(engine.EnvTuned, "off")
		assert.Equal(t, engine.TunedDescription{Choices: 2, Off: true}, unused(t))
	})
	t.Run("damaged", func(t *testing.T) {
		require.NoError(t, os.Truncate(path, 100))
		assert.Contains(t, unused(t).Error, "damaged")
	})
}

// Other kernels than those that were measured have a file of their own.
func TestChoicesOfOtherKernelsAreNotUsed(t *testing.T) {
	open(t)
	t.Setenv(jit.EnvCacheDir, t.TempDir())
	_, e := again(t)
	save(t, device(t, e, 0))
	f := drivertest.New(t)
	e, err := engine.New(f.Open())
	require.NoError(t, err)
	assert.Nil(t, e.Describe().Devices[0].Tuned)
}

// What one version of the package measured is not used by another.
func TestChoicesOfAnotherVersionAreNotUsed(t *testing.T) {
	open(t)
	t.Setenv(jit.EnvCacheDir, t.TempDir())
	_, e := again(t)
	save(t, device(t, e, 0))
	engine.SetVersion("9.9.9")
	defer engine.SetVersion("")
	_, e = again(t)
	assert.Nil(t, e.Describe().Devices[0].Tuned)
}

// A choice from the file whose kernel cannot be had is passed over.
func TestATunedChoiceThatDoesNotWorkOutIsPassedOver(t *testing.T) {
	open(t)
	t.Setenv(jit.EnvCacheDir, t.TempDir())
	_, e := again(t)
	save(t, device(t, e, 0))
	f, e := again(t)
	d := device(t, e, 0)
	require.NoError(t, d.Choose(few, nil))
	multiply(t, d, 5) // loads what is used without a choice
	require.NoError(t, d.Unchoose(few))
	f.Fail("cuModuleLoadData", 200, 0)
	multiply(t, d, 5)
	assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f))
}

func TestPrepareLeavesNothingToDo(t *testing.T) {
	f, e := open(t)
	d := device(t, e, 0)
	choice := plan.Choice{Kernel: "mma", MW: 2, KW: 4, Blocks: 96}
	for _, p := range []tuned.Problem{few, {M: 4096, K: 4096, Tokens: 256}, {M: 4096, K: 4096, Invariant: true}} {
		require.NoError(t, d.Prepare(p, choice))
	}
	multiply(t, d, 5)
	assert.NotEqual(t, "grid 96,1,1 block 256", shape(t, f), "preparing chooses nothing")
	f.Reset()
	require.NoError(t, d.Choose(few, &choice))
	assert.Zero(t, count(f, "load"))
}

func TestControl(t *testing.T) {
	t.Setenv(jit.EnvCacheDir, t.TempDir())
	for text, reason := range map[string]string{
		"": "not a request", "[]": "not a request", `{"do":"dance"}`: "no request", `{"do":"list","more":1}`: "not a request",
	} {
		_, err := engine.Control(0, []byte(text))
		var wrong engine.ArgumentError
		require.ErrorAs(t, err, &wrong, text)
		assert.ErrorContains(t, err, reason)
	}
	out, err := engine.Control(-1, []byte(`{"do":"list"}`))
	require.NoError(t, err)
	assert.Equal(t, "{}", string(out))
	out, err = engine.Control(-1, []byte(`{"do":"clear"}`))
	require.NoError(t, err)
	assert.Equal(t, "{}", string(out))
	t.Setenv(jit.EnvCacheDir, "off")
	_, err = engine.Control(-1, []byte(`{"do":"list"}`))
	assert.True(t, err != nil && strings.Contains(err.Error(), "switched off"))
}
